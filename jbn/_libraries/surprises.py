"""What surprises in each library: for docs/libraries.md, and for whoever gave it something else."""

UNCOUNTED = "With momentum=None a counter that starts again at 0 lets the next batch replace what was loaded."
BACKWARD = "The statistics move in the backward pass."
RANK = "One layer divides its running variance by n for 2-D and 3-D input, and by n - 1 for 4-D."

RENORM = (
    "After 100,000 steps by its counter it is a batch renormalization with epsilon in another place than in the paper: "
    "it divides by the root of variance / r^2 + epsilon. A feature that is constant in a batch is not corrected."
)

SURPRISES = {
    "torch": f"PyTorch refuses a state_dict without num_batches_tracked, and takes a plain dict without. {UNCOUNTED}",
    "torchvision frozen": "Nothing moves and nothing is learned: weight and bias are buffers.",
    "timm": "Models whose names start with tf_ have epsilon 1e-3. An activation follows in the same layer.",
    "torch geometric": "With allow_single_element one node is evaluated by the running statistics, which stay.",
    "torch geometric hetero": "Biased, unlike its BatchNorm, with a mean and a variance for each type of node. No "
    "gradient goes through the statistics of the batch.",
    "flax": "A batch of which all is masked leaves NaN.",
    "keras": "A .weights.h5 file has no names: entry 0 is gamma, or beta with scale=False, or the mean without both; "
    "a file of one kind loads into a layer of the other.",
    "tensorflow": "The names are the operation's arguments. It takes the weight of the new value, without a default: "
    "0.01 and epsilon 1e-3 are those of tf.keras 2.",
    "tensorflow keras": "Unbiased where the fused operation is used, as for images by default; Keras 3 on TensorFlow "
    "is biased.",
    "haiku": "decay_rate has no default; 0.9 is that of its ResNet. After init the average holds the moments of the "
    "array that init was given, at counter 0.",
    "sonnet": RANK,
    "sonnet images": RANK,
    "equinox ema": "The first batch replaces the averages.",
    "equinox batch": "To evaluate, mean and variance are divided by 1 - momentum^counter.",
    "onnx": "These are the inputs of the operator; initializers have any name. training_mode=1 moves the statistics. "
    "Exporters fold the norm away, or write a network in training mode as one for inference, without a word.",
    "paddle": "PyTorch's first two names, and momentum is the weight of the old value. One value in training comes "
    "back as it is. use_global_stats=False evaluates by the batch.",
    "mxnet": BACKWARD,
    "mxnet operator": "fix_gamma=True, the default: gamma means 1 whatever is stored, and is overwritten with 1, even "
    "in evaluation. Where the graph says fix_gamma=False, it is 'mxnet operator free'.",
    "mxnet operator free": BACKWARD,
    "mindspore": "Keras's names with an unbiased variance; a layer saved alone has mean and variance for the last two. "
    "The attribute momentum holds 1 - the argument. One value in training leaves NaN.",
    "chainer": "N stays 0, but for finetune=True.",
    "mlx": "Biased before 0.32.1 (read). A parent's unfreeze() makes the statistics trainable.",
    "tinygrad": "One value in training: ZeroDivisionError.",
    "objax": "Decay 0.999 and epsilon 1e-6.",
    "nnabla": "One value in training leaves NaN.",
    "megengine": "PyTorch's names, and momentum is the weight of the old value. [1, C, 1, 1] in memory, [C] in files.",
    "e3nn": "It divides by the root of (1 - epsilon) var + epsilon. Other irreps than 0e have one variance, a mean "
    "square, and no mean.",
    "brainstate": "Scale and bias are one state, weight.",
    "jittor": "PyTorch's names with a biased variance, max(E[x^2] - E[x]^2, 0).",
    "trax": "beta comes first.",
    "treex": "momentum is a leaf of the tree, which an optimizer may move.",
    "nflows": "The scale is softplus(weight) + epsilon. Both averages start at 0 and are never debiased, so the "
    "variance is too small by decay^steps.",
    "pyro": "Keras's names. The scale is relu(gamma) + 1e-6. The inverse of the flow is what normalizes.",
    "sbx": f"{RENORM} Its file loads into jbn.linen.BatchRenorm, steps and all; the other way round r_max and d_max, 3 "
    "and 5, are to be added.",
    "sb3 contrib": RENORM,
    "torchrl": "After 10,000 steps by its counter it is a batch renormalization, whose correction is multiplied by how "
    "often so many have gone by: after 20,000 it is twice what its limits allow. Where x is not 2-D, the running "
    "variance takes the rows for n.",
    "ncnn": "Epsilon is 0 by default; a variance of 0 then divides by 1e-4.",
}
