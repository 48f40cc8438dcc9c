"""A protocol of answers, for tests that vary what they are about: `replace(answers, task="qmsum")`."""

from __future__ import annotations

import pytest

from longspan.evaluation.tasks.result import TaskProtocol


@pytest.fixture
def answers() -> TaskProtocol:
    return TaskProtocol(
        task="lambada",
        version=1,
        ask="force",
        long_texts="refuse",
        max_tokens=512,
        start=(256,),
        max_new_tokens=0,
        lengths=(),
        depths=(),
        samples=None,
        seed=0,
        questions=2,
        questions_sha256="0",
        files={},
        n_refused=0,
        tokenizer_sha256="0",
        precision="fp32",
    )
