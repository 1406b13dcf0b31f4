import json
import shutil
from pathlib import Path

import pytest

from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.echo import boundary_ids, segment_steps
from echorl_nemo.errors import UserError


def test_stop_tokens_include_those_of_the_generation_config(tiny_chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_chain / "model", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 25]}))
    assert Tokenizer(str(folder)).stop_ids == (1, 25)
    (folder / "generation_config.json").unlink()
    assert Tokenizer(str(folder)).stop_ids == (1,)


def test_the_tiny_task_has_one_boundary_and_a_line_is_a_step(tiny_chain: Path) -> None:
    import torch

    tokenizer = Tokenizer(str(tiny_chain / "model"))
    (newline,) = boundary_ids(tokenizer)
    assert tokenizer.pieces([newline]) == ["\n"]
    tokens = torch.tensor([[*tokenizer.encode("a6+7=3\nA:3\n"), tokenizer.hf.eos_token_id]])
    steps = segment_steps(tokens, torch.ones_like(tokens, dtype=torch.bool), [newline])
    assert steps.tolist() == [[0] * 6 + [1] * 3 + [2]]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.path=.*no tokenizer can be read"):
        Tokenizer(str(tmp_path))
