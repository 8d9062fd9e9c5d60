"""The tolerances of the tests and of `gpt-xp compare`: one table, with the reason for each row.

Each tolerance is the largest allowed difference, relative to the largest of the compared numbers.
"""

TOLERANCE = {
    # Logits, compared with float64. float32 has 7 digits; sums of a few thousand products in another order lose one.
    ("logits", "float32"): 2e-5,
    # float64 has 16 digits, and two are lost.
    ("logits", "float64"): 1e-9,
    # Half precision has 3 digits (float16) or 2 (bfloat16), and every layer rounds the residual stream again.
    ("logits", "float16"): 2e-2,
    ("logits", "bfloat16"): 1e-1,
    # The error that one layer may add to the residual stream: a few roundings of its largest number.
    ("layer", "float32"): 5e-7,  # 4 * 2**-23
    ("layer", "float64"): 1e-14,  # More than 4 * 2**-52: exp and tanh of libraries differ in the last bits.
    ("layer", "float16"): 4e-3,  # 4 * 2**-10
    ("layer", "bfloat16"): 3e-2,  # 4 * 2**-7
    # The same formula summed in another order: cached and full, batch and single row, jitted and eager.
    ("same", "float32"): 5e-6,
    ("same", "float64"): 1e-13,
    # One elementary function, compared element by element.
    ("function", "float32"): 2e-6,
    ("function", "float64"): 1e-13,
    # A gradient is a sum of products of such numbers over all tokens.
    ("gradient", "float32"): 1e-4,
    # transformers computes the loss of a float64 model in float32.
    ("gradient of transformers", "float64"): 1e-6,
    # Adam divides each gradient by its own size in its first steps. Small gradients then move a weight as far as large
    # ones do, together with their rounding error.
    ("first steps of Adam", "float32"): 1e-3,
}

# A layer's error is out of line if it is this many times the error that its row of the table and its depth allow.
OUT_OF_LINE = 10
