"""What a tap adds to `generate`: which ways of generating it refuses, and how a sample ends on a block."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from guard.errors import InvalidInput


class Batch(Protocol):
    """The batch that a tap has in hand."""

    def stopped(self) -> list[bool]: ...

    def over(self) -> list[bool]: ...

    def finished(self, done: Sequence[bool]) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """How one call generates."""

    kwargs: dict[str, Any]
    eos: tuple[int, ...]
    ending: tuple[int, ...]  # what a sample that is over is fed: end of text, or padding; none where there is neither
    criteria: list[StoppingCriteria]  # the caller's own, and the stop strings


def settings_of(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Settings:
    """Raises InvalidInput for beams, for speculation, and for what a tap does not know."""
    if args:
        raise InvalidInput("generate: found positional arguments behind the ids, expected all others by name")
    given = kwargs.get("generation_config")
    config = copy.deepcopy(given) if given is not None else GenerationConfig()
    config.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    config.update(**{key: value for key, value in kwargs.items() if value is not None})
    if (config.num_beams or 1) > 1:
        raise InvalidInput(
            f"num_beams: found {config.num_beams}, expected 1: beams swap tokens that a tap has told of already"
        )
    if (config.guidance_scale or 1) != 1 or kwargs.get("negative_prompt_ids") is not None:
        raise InvalidInput(
            "guidance_scale: found guidance, expected none: a tap would see the unguided text beside the guided"
        )
    mode = config.get_generation_mode(kwargs.get("assistant_model")).value
    if mode == "assisted_generation":
        raise InvalidInput(
            "assisted generation: found an assistant or prompt lookup, expected none: of the tokens that it drafts "
            "some are rejected, and a tap would have told of them"
        )
    if mode not in {"greedy_search", "sample"} or kwargs.get("custom_generate") is not None:
        name = "custom_generate" if kwargs.get("custom_generate") is not None else mode
        raise InvalidInput(f"generate: found {name}, expected greedy search or sampling")
    given_eos, pad = config.eos_token_id, config.pad_token_id
    eos = () if given_eos is None else tuple(given_eos) if isinstance(given_eos, list | tuple) else (given_eos,)
    criteria = list(kwargs.get("stopping_criteria") or ())
    if config.stop_strings and kwargs.get("tokenizer") is not None:  # without one generate itself complains
        criteria.append(StopStringCriteria(kwargs["tokenizer"], config.stop_strings))
    return Settings(
        # A compiled forward would run the hooks once, while it is traced.
        kwargs=kwargs | {"disable_compile": True},
        eos=eos,
        ending=eos or (() if pad is None else (pad,)),
        criteria=criteria,
    )


def steered(batch: Batch, settings: Settings) -> dict[str, Any]:
    """The call's arguments, with what ends samples on a block and tells the tap of those that have ended."""
    kwargs = settings.kwargs
    processors = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), _Last(batch, settings)])
    criteria = StoppingCriteriaList([_Watch(batch, settings)])
    return kwargs | {"logits_processor": processors, "stopping_criteria": criteria}


class _Last(LogitsProcessor):
    """Lets a blocked sample's next token be the end of text: nothing follows the token on which its verdict turned.

    Where there is no such token it is padding, and for every sample that has ended: transformers pads none then, and
    what it would go on with nobody judges. Where there is neither, `_Watch` ends the one sample, one token later.
    """

    def __init__(self, batch: Batch, settings: Settings) -> None:
        self._batch, self._eos, self._ending = batch, settings.eos, settings.ending

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - its place in the call
        over = self._batch.stopped() if self._eos else self._batch.over()
        if not self._ending or not any(over):
            return scores
        chosen = torch.tensor(over, device=scores.device)
        only = torch.full_like(scores, -torch.inf)
        only[:, self._ending[0]] = 0.0
        return torch.where(chosen[:, None], only, scores)


class _Watch(StoppingCriteria):
    """The caller's own criteria, and a block."""

    def __init__(self, batch: Batch, settings: Settings) -> None:
        self._batch, self._eos, self._criteria = batch, settings.eos, settings.criteria

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ended = torch.tensor(self._batch.stopped(), device=input_ids.device)
        for criterion in self._criteria:
            ended |= torch.as_tensor(criterion(input_ids, scores, **kwargs), device=input_ids.device)
        last = torch.isin(input_ids[:, -1], torch.tensor(self._eos, dtype=input_ids.dtype, device=input_ids.device))
        self._batch.finished((ended | last).tolist())
        return ended
