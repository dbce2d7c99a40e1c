"""Runs in vLLM's environment: `drive.py JOB OUT` with a job of JSON; its waves of requests run one behind the other.

{"engine": {arguments of vllm.LLM}, "waves": [[{"prompt": [ids], "params": {arguments of SamplingParams}}]]}
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def sampling(structured_outputs=None, **params) -> SamplingParams:
        grammar = StructuredOutputsParams(**structured_outputs) if structured_outputs else None
        return SamplingParams(structured_outputs=grammar, **params)

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    llm = LLM(**job["engine"], disable_log_stats=False)
    told = []
    for wave in job["waves"]:
        outputs = llm.generate(
            [{"prompt_token_ids": request["prompt"]} for request in wave],
            [sampling(**request["params"]) for request in wave],
            use_tqdm=False,
        )
        told.append(
            [
                {"id": o.request_id, "ids": list(o.outputs[0].token_ids), "finish": o.outputs[0].finish_reason}
                for o in outputs
            ]
        )
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    Path(sys.argv[2]).write_text(json.dumps({"waves": told, "counters": counters}), encoding="utf-8")


if __name__ == "__main__":
    main()
