"""Chats through the tokenizer's chat template, which runs in a worker process.

Input: the tokenizer's path; a chat's messages in JSON. Output: the chat's text, which then is tokenized as it stands.
Errors: `ConfigError` for a template that is missing, or that refuses a chat, naming the file and the chat's number;
`FormatError` for a tokenizer_config.json that is damaged, and for a template that does not end.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from tierstore.errors import ConfigError, FormatError
from tierstore.extras import missing

from .folders import read_index_json
from .processes import WorkerProcess

ANSWER_S = 30.0  # of one chat
DEFAULT = "default"  # of a tokenizer with several templates
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """Renders chats; use it with `with`. The worker is started for the first chat."""

    def __init__(self, tokenizer: Path | None) -> None:
        """tokenizer: a tokenizer.json, or its folder; the template lies beside it."""
        self._folder = None if tokenizer is None else tokenizer if tokenizer.is_dir() else tokenizer.parent
        self._worker = WorkerProcess("chat_worker", answer_s=ANSWER_S)
        self._is_loaded = False

    def render(self, path: Path, number: int, messages: str) -> str:
        """Returns the text of a chat. path and number: of the chat, for errors. messages: JSON."""
        if not self._is_loaded:
            self._load(path)
        try:
            (_, text), *_ = list(self._worker.ask(path, {"do": "render"}, messages.encode()))
        except ConfigError as error:
            raise ConfigError(f"{path}: chat {number}: {str(error).removeprefix(f'{path}: ')}") from error
        return bytes(text).decode()

    def _load(self, path: Path) -> None:
        found = self._template()
        if found is None:
            raise ConfigError(
                f"{path} holds chat messages, and there is no chat template beside the tokenizer; give --tokenizer the "
                f"folder with tokenizer.json and chat_template.jinja or tokenizer_config.json, or name a field of text"
            )
        if importlib.util.find_spec("jinja2") is None:
            raise missing(f"{path}: a chat template", "data", ImportError("No module named 'jinja2'"))
        template, variables = found
        for _ in self._worker.ask(path, {"do": "load", "template": template, "variables": variables}):
            pass
        self._is_loaded = True

    def _template(self) -> tuple[str, dict[str, Any]] | None:
        """Returns the template and the special tokens that it may use; None without a template."""
        if self._folder is None:
            return None
        config_path = self._folder / "tokenizer_config.json"
        config = read_index_json(config_path) if config_path.is_file() else {}
        single = self._folder / "chat_template.jinja"
        if single.is_file():
            template: Any = single.read_text(encoding="utf-8", errors="replace")
        else:
            template = config.get("chat_template")
            if isinstance(template, list):  # several, each with a name
                named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
                template = named.get(DEFAULT)
        if template is None:
            return None
        if not isinstance(template, str):
            raise FormatError(f"{config_path}: its chat_template is {json.dumps(template)[:60]}; download it again")
        tokens = {name: config.get(name) for name in SPECIAL_TOKENS}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
        return template, {name: text for name, text in texts.items() if isinstance(text, str)}

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()
