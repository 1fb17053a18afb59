"""Clients of bench/inference.py in a process of their own: streams at the same time, timed whole.

Reads {"port", "rounds": [[body, ..], ..]} as JSON, writes {"seconds": [..]}. Standard library only.
"""

import http.client
import json
import sys
import threading
import time


def stream(port: int, body: dict) -> None:
    """Read one streamed completion to its end. Raises: RuntimeError if it is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200 or b"data: [DONE]" not in text or b'data: {"error"' in text:
        raise RuntimeError(f"status {answer.status}: {text[-300:]!r}")
    connection.close()


def main() -> None:
    """One round after the other; the requests of a round together."""
    given = json.loads(sys.stdin.read())
    seconds = []
    for bodies in given["rounds"]:
        failed: list[BaseException] = []

        def one(body: dict, failed: list[BaseException] = failed) -> None:
            try:
                stream(given["port"], body)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=one, args=(body,)) for body in bodies]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds.append(time.perf_counter() - began)
        if failed:
            raise failed[0]
    sys.stdout.write(json.dumps({"seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
