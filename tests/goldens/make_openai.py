"""Make goldens/openai: a small GPT-2 with random weights in the files that OpenAI published, written by TensorFlow.

    pip install -e '.[dev,oracle]'
    python tests/goldens/make_openai.py

`tests/checkpoint/test_openai.py` converts them, and writes others with `save_tensorflow`.
"""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "support"))


def save_tensorflow(
    directory: Path, variables: dict[str, Any], name: str = "model.ckpt", step: int | None = None
) -> None:
    """Write a checkpoint of these variables as TensorFlow 1 did, which both OpenAI and gpt-2-simple used."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:
        # The numbers are fed, not constants: those would go into the .meta file a second time.
        feeds = {key: v1.placeholder(value.dtype, value.shape) for key, value in variables.items()}
        made = [v1.Variable(feeds[key], name=key, use_resource=False) for key in variables]
        saver = v1.train.Saver(made, save_relative_paths=True)  # or the file `checkpoint` names this machine's folders
        session.run(v1.global_variables_initializer(), {feeds[key]: value for key, value in variables.items()})
        saver.save(session, str(directory / name), global_step=step)


def main() -> None:
    from openai_files import make_tensors, variables, write_texts

    save_tensorflow(write_texts(HERE / "openai"), variables(make_tensors()))


if __name__ == "__main__":
    main()
