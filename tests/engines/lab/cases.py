"""What the lab compares: runs of vLLM with resident tables, and the same with rows from tierstore.

Input: none. Output: `CASES`. Errors: none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True, "enforce_eager": True, "dtype": "bfloat16", "max_num_batched_tokens": 16,
    "max_num_seqs": 4, "enable_prefix_caching": False, "max_model_len": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run over a store, and the resident run that it is compared with: the same options but for tierstore.

    Attributes:
        name: What it shows.
        version: The engine's.
        dtype: The rows', which chooses the checkpoint.
        engine: Options of the engine, beside `ENGINE`.
        run: Options of the run: prompts, rounds, rotate.
        variables: Of the environment; for both runs.
        daemon: Whether rows come from a daemon.
        differs: Whether the answers must differ: the negative control.
        resident: Variables of the resident run alone, if it is another run than this one without tierstore.
    """

    name: str
    version: str = "0.32.0"
    dtype: str = "bf16"
    engine: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    daemon: bool = False
    differs: bool = False
    resident: dict[str, str] | None = None

    @property
    def caches(self) -> bool:
        """Whether tokens must come from the engine's prefix cache."""
        return bool(self.engine.get("enable_prefix_caching"))

    def baseline_key(self) -> tuple[Any, ...]:
        """Cases of one key share a resident run."""
        run = {name: value for name, value in self.run.items() if name != "rotate"}
        variables = self.variables if self.resident is None else self.resident
        parts = (self.engine, run, variables)
        return (self.version, self.dtype, *(tuple(sorted((k, str(v)) for k, v in each.items())) for each in parts))


WHOLE = {"max_num_batched_tokens": 64}
SHARED = {"enable_prefix_caching": True, "max_model_len": 1024, "max_num_batched_tokens": 768}
LOOKUP = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
NGRAM = {"speculative_config": LOOKUP}
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

CASES = (
    Case("chunked prefill, two requests at once"),
    Case("negative control: every row is its neighbour", run={"rotate": True}, differs=True),
    Case("through a daemon", daemon=True),
    Case("engine in a process of its own", variables=PROCESSES, resident={}),
    Case("prefill in one piece", engine=WHOLE),
    Case("prefix caching, second round of the same prompts", engine=SHARED, run={"prompts": "prefix", "rounds": 2}),
    Case("prefix caching off, the same prompts", engine=SHARED | {"enable_prefix_caching": False},
         run={"prompts": "prefix", "max_tokens": 1}),
    Case("speculative decoding by ngrams", engine=NGRAM, run={"prompts": "repeats", "max_tokens": 8}),
    Case("tensor parallel 2, by gloo", engine={"tensor_parallel_size": 2}, variables=PROCESSES),
    Case("fp8 rows", dtype="fp8", version="0.33.0"),
    Case("bf16 rows", version="0.33.0"),
    Case("NVFP4 rows", dtype="nvfp4", version="0.33.0"),
)  # fmt: skip
