"""The default job of a comparison: its prompts, and the settings that continue them."""

from typing import Any

# The ways in which each prompt is continued, as arguments of `Model.generate`.
MODES: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 1.0}}

# Short and long prompts, prose and verse, numbers, code, and bytes of all kinds. They were written for this project,
# except the lines of Shakespeare. The longest has more than 128 tokens in the bundled model's vocabulary. So it is read
# in two chunks, and leaves room for a continuation in a context of 256.
PROMPTS = (
    "ROMEO:",
    "Alan Turing theorized that computers would one day become",
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n"
    "The slings and arrows of outrageous fortune,\nOr to take arms against a sea of troubles\n"
    "And by opposing end them. To die: to sleep;\nNo more; and by a sleep to say we end\n"
    "The heart-ache and the thousand natural shocks\nThat flesh is heir to, 'tis a consummation\n"
    "Devoutly to be wish'd. To die, to sleep;\nTo sleep: perchance to dream: ay, there's the rub;\n",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89,",
    "def softmax(x):\n    exp_x = exp(x - max(x))\n    return",
    "Größe, naïveté, Привет, 日本語, 🙂:",
)
