"""Decoding of tokens to text while they come."""

from collections.abc import Sequence

from fused_megatron.data.tokenizer import Tokenizer

# What a decoder writes for bytes that are not (yet) a character.
_INCOMPLETE = "\ufffd"
# Tokens before a new one that are decoded with it: some decoders treat the first token of a text differently.
_CONTEXT = 8


class TextStream:
    """The text that continues a prompt, piece by piece; a character of several tokens comes with the last of them.

    Args:
        tokenizer: of the tokens.
        prompt: token ids before the new ones.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._context, self._shown = 0, len(self._ids)

    def add(self, token: int) -> str:
        """Take a token; return the text that is complete now and was not returned before."""
        self._ids.append(token)
        return self._next(wait=True)

    def finish(self) -> str:
        """Return what is left, with U+FFFD for bytes that are no character."""
        return self._next(wait=False)

    def _next(self, wait: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        text = self._tokenizer.decode(self._ids[self._context :])
        if len(text) <= len(before) or (wait and text.endswith(_INCOMPLETE)):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]
