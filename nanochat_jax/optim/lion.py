"""Lion: the sign of an interpolated momentum (arXiv:2302.06675).

optax has it; this file gives it our argument names and the complete form beside Muon's. It does
not reimplement anything.
"""

import optax


def scale_by_lion(beta1: float = 0.9, beta2: float = 0.99) -> optax.GradientTransformationExtraArgs:
    """Replace each update by sign(beta1 * mu + (1 - beta1) * g); then mu averages g with beta2.

    Args: beta1, beta2: in [0, 1).
    Returns: transform without learning rate or sign; one moment of state, shaped like params.
    Source: arXiv:2302.06675, algorithm 2.
    """
    return optax.with_extra_args_support(optax.scale_by_lion(beta1, beta2))


def lion(
    learning_rate: optax.ScalarOrSchedule, beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Complete Lion: direction, decoupled decay, learning rate.

    Args:
        learning_rate: float or schedule; 3 to 10 times below AdamW's.
        beta1, beta2: in [0, 1).
        weight_decay: decoupled; 3 to 10 times above AdamW's.

    Returns: transform whose updates are added to the parameters.
    Source: arXiv:2302.06675.
    """
    return optax.chain(
        scale_by_lion(beta1, beta2),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
