"""tierstore's counters in the metrics of vLLM's server: the engine in a process of its own, its front in this one.

Input: a JSON file of options. Output: a JSON file: the lines of the metrics page that begin with tierstore_engine_.
Errors: those of vLLM; the exit status is then not 0.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, generate_latest

WRITTEN_S = 3.0  # workers write their counters every second


async def lines_of(options: dict[str, Any]) -> list[str]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options["engine"]))
    try:
        prompt = TokensPrompt(prompt_token_ids=[5, 9, 3, 77, 401])
        sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, detokenize=False)
        async for _ in engine.generate(prompt, sampling, request_id="1"):
            pass
        await asyncio.sleep(WRITTEN_S)
        return [
            line for line in generate_latest(REGISTRY).decode().splitlines() if line.startswith("tierstore_engine_")
        ]
    finally:
        engine.shutdown()


if __name__ == "__main__":
    found = asyncio.run(lines_of(json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(found))
