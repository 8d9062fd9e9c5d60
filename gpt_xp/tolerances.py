"""How close is close enough: one table, with the reason for each row, for the tests and for `gpt-xp compare` alike.

Each number is the largest difference that is allowed, relative to the largest number of what is compared.
"""

TOLERANCE = {
    # Logits against float64. float32 keeps 7 digits; sums over a few thousand products in another order lose one.
    ("logits", "float32"): 2e-5,
    # The same in float64 keeps 16 digits and loses two.
    ("logits", "float64"): 1e-9,
    # Half precision keeps 3 digits (float16) or 2 (bfloat16), and every layer rounds the residual stream anew.
    ("logits", "float16"): 2e-2,
    ("logits", "bfloat16"): 1e-1,
    # What one layer may add to the error of the residual stream: a few roundings of its largest number.
    ("layer", "float32"): 5e-7,  # 4 * 2**-23
    ("layer", "float64"): 1e-14,  # more than 4 * 2**-52: two libraries' exp and tanh differ in the last bits too
    ("layer", "float16"): 4e-3,  # 4 * 2**-10
    ("layer", "bfloat16"): 3e-2,  # 4 * 2**-7
    # The same formula twice, summed in another order: cached against full, batch against row, jitted against eager.
    ("same", "float32"): 5e-6,
    ("same", "float64"): 1e-13,
    # One elementary function, element by element.
    ("function", "float32"): 2e-6,
    ("function", "float64"): 1e-13,
    # A gradient is a sum over all tokens of products of such numbers.
    ("gradient", "float32"): 1e-4,
    # The same as transformers computes it in a float64 model: its loss is in float32 all the same.
    ("gradient of transformers", "float64"): 1e-6,
    # What Adam's first steps make of gradients: each is divided by its own size, so small ones move a weight as far as
    # large ones do, with all of their rounding.
    ("first steps of Adam", "float32"): 1e-3,
}

# A layer's error is out of line when it is this many times what its row and its depth allow.
OUT_OF_LINE = 10
