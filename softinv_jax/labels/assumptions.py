"""What a recovery takes for granted, as codes a program can read, each with its sentence and its remedy."""

import enum
from typing import NamedTuple

__all__ = ["Assumption", "Explained", "Loss", "explain_assumptions"]


class Loss(enum.IntEnum):
    """The loss that explains a gradient. WEIGHTED: times a factor that was not told.

    With the softmax p of the logits z, or of z / T where tempered, and the label y: dL/dz = p - y, over T where
    tempered. A class weight, and focal loss with a hard label, are factors on that. BINARY_CROSS_ENTROPY: C independent
    sigmoids, dL/dz = (sigmoid(z) - y) / C.
    """

    UNKNOWN = 0
    CROSS_ENTROPY = 1
    WEIGHTED_CROSS_ENTROPY = 2
    TEMPERED_CROSS_ENTROPY = 3
    WEIGHTED_TEMPERED_CROSS_ENTROPY = 4
    BINARY_CROSS_ENTROPY = 5
    WEIGHTED_BINARY_CROSS_ENTROPY = 6


class Assumption(enum.IntFlag):
    """What may be refuted, or what a conditional label rests on; several are added up."""

    SOFTMAX = 1
    LABEL_RANGE = 2
    LOSS = 4
    SCALE = 8
    ONE_EXAMPLE = 16
    GRADIENT = 32
    ALL_ENTRIES = 64
    BIAS = 128
    BATCH_SIZE = 256
    DISTINCT_EXAMPLES = 512
    PARAMETERS = 1024


class Explained(NamedTuple):
    """An assumption in words: its code in lower case, what the gradient says against it, and what to do."""

    code: str
    sentence: str
    remedy: str


_WORDS = {
    Assumption.SOFTMAX: (
        "The rows of the gradient do not add up to zero, as they do for every softmax loss.",
        "Name the loss if you know it (loss='binary_cross_entropy' for independent sigmoids).",
    ),
    Assumption.LABEL_RANGE: (
        "At the loss and scale that were told, the label would have entries below 0 or above 1.",
        "Check the learning rate and the reduction, or leave the scale open (unknown_scale=True).",
    ),
    Assumption.LOSS: (
        "The loss is not plain cross-entropy of the logits.",
        "Name the loss if you know it; the one that was found is in `assumptions.loss`.",
    ),
    Assumption.SCALE: (
        "The gradient is not at the scale that was told.",
        "Check the learning rate, the reduction, class weights and clipping; the factor found is in `scale`.",
    ),
    Assumption.ONE_EXAMPLE: (
        "What is left of the gradient beyond one outer product is no noise: several examples, or several local steps.",
        "Tell the batch size, or use batch_size='auto' (--batch-size auto); tell local_steps where there were several.",
    ),
    Assumption.GRADIENT: (
        "Nearly all entries have one size: these are signs, as Adam's first step sends them, and no gradient.",
        "The class may be read off the signs; for the label observe a client that sends gradients or runs SGD.",
    ),
    Assumption.ALL_ENTRIES: (
        "Entries were set to zero that one outer product would not have there: pruned, masked or sampled.",
        "Nothing is sure of the rows concerned; observe the gradient before entries are dropped.",
    ),
    Assumption.BIAS: (
        "The gradients of weight and bias are not of one example: they disagree by more than noise.",
        "Check that both belong to one layer and one step, and that both are at the same scale.",
    ),
    Assumption.BATCH_SIZE: (
        "The rank of the gradient shows another number of examples than was told.",
        "Use batch_size='auto' (--batch-size auto), or the number that `rank` shows.",
    ),
    Assumption.DISTINCT_EXAMPLES: (
        "Some examples of the batch cannot be told apart: their features are parallel, or one is there twice.",
        "Those are given together, with the mean of their labels.",
    ),
    Assumption.PARAMETERS: (
        "The predictions differ from those of the parameters that were given by more than rounding.",
        "Check that the parameters are those the client computed with; low-precision arithmetic shows the same.",
    ),
}


def explain_assumptions(codes: int) -> list[Explained]:
    """The assumptions in `codes` in words, in a fixed order.

    >>> [one.code for one in explain_assumptions(Assumption.SOFTMAX | Assumption.SCALE)]
    ['softmax', 'scale']
    """
    present = Assumption(int(codes))
    return [Explained(str(one.name).lower(), *_WORDS[one]) for one in Assumption if one in present]
