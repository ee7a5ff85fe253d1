"""Conversations for training: exchanges from `skills`, joined into chats and cut into batches of token ids.

Chats grow until they fill a row of 128 to 1024 tokens, so that short questions and long histories are both
common. The loss counts the assistant's tokens only; a few rows are plain text for prompts without a template.
"""

import itertools
import math
from collections.abc import Iterator
from random import Random

import numpy as np
import skills
from knowledge import GENERAL, SMALL_TALK, TOKENPLANE
from phrases import ANIMALS, BRIEF_SYSTEM, FACTS, FIRST_WORD_SYSTEM, LISTS, PLAIN_SYSTEM, casual, person, word
from tokenizers import Tokenizer

Message = dict[str, str]
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

# Row length in tokens -> share of the training tokens.
ROW_SHARES = {128: 0.70, 256: 0.22, 512: 0.05, 1024: 0.03}

# Share of the short rows that are a random pattern said again and again: they keep the copying circuit of `wiring`
# alive, on which names, JSON values and repeated words depend. (until this batch, share)
ECHO_SHARES = ((200, 0.15), (1 << 60, 0.03))

# How often each skill is drawn. Sums and JSON are many because they are learned by rule, not by heart.
MIX = {
    "sums": 0.26, "hard_sums": 0.02, "know": 0.22, "small_talk": 0.12, "json_object": 0.16, "lists": 0.04,
    "counting": 0.01, "repeat": 0.06, "stories": 0.02, "unknown": 0.04, "everything": 0.003, "memory": 0.05,
}  # fmt: skip

WHO = [ask for asks, _ in SMALL_TALK for ask in asks if ask in ("Who are you?", "What are you?", "What is your name?")]


class Chat:
    """One invented conversation. It remembers what the user told, and obeys its system prompt."""

    def __init__(self, rng: Random, skill: str | None = None) -> None:
        self.rng, self.skill = rng, skill
        self.told: dict[str, str] = {}
        self.system: str | None = None
        self.persona: str | None = None
        self.first_word: str | None = None
        self.brief = False
        kind = rng.random()
        if kind < 0.14:
            self.system = rng.choice(PLAIN_SYSTEM)
        elif kind < 0.16:
            self.persona = person(rng)
            self.system = rng.choice(["You are {}.", "You are {}, a helpful assistant.", "Your name is {}."]).format(
                self.persona
            )
        elif kind < 0.18:
            self.brief, self.system = True, rng.choice(BRIEF_SYSTEM)
        elif kind < 0.19:
            self.first_word = word(rng).capitalize()
            self.system = rng.choice(FIRST_WORD_SYSTEM).format(self.first_word)

    def turn(self, long_words: int = 0) -> skills.Turn:
        """The next exchange."""
        rng = self.rng
        if long_words:
            ask, answer = skills.unknown(rng, long_words)
        elif self.persona and rng.random() < 0.4:
            ask, answer = casual(rng, rng.choice(WHO)), f"I am {self.persona}. How can I help you?"
        else:
            name = self.skill or rng.choices(list(MIX), list(MIX.values()))[0]
            if name == "memory":
                ask, answer = self.memory()
            elif name == "know":
                topic = rng.choice(TOKENPLANE if rng.random() < 0.85 else GENERAL)
                ask, answer = skills.know(rng, topic, self.brief)
            else:
                ask, answer = getattr(skills, name)(rng)
        if self.persona and ask.lower().startswith(
            ("who are you", "what are you", "what is your name", "what's your name")
        ):
            answer = f"I am {self.persona}. How can I help you?"
        return ask.strip(), f"{self.first_word}! {answer}" if self.first_word else answer

    def memory(self) -> skills.Turn:
        """The user tells something about himself, or asks for it."""
        rng = self.rng
        key = rng.choice(["name", "name", "name", *FACTS])
        tell, noted, ask, known, missing = FACTS[key]
        if (key not in self.told and rng.random() < 0.75) or rng.random() < 0.15:
            place = skills.FIELDS[rng.choice(["city", "town"])]
            draw: dict[str, skills.Draw] = {
                "name": person,
                "colour": lambda r: r.choice([*LISTS["colours"].split(), "teal", "gold", "pink"]),
                "city": place,
                "animal": lambda r: r.choice(ANIMALS),
                "number": lambda r: r.randint(2, 999),
            }
            value = str(draw[key](rng))
            self.told[key] = value
            return casual(rng, rng.choice(tell)).replace("{}", value), noted.replace("{}", value)
        answer = known.replace("{}", self.told[key]) if key in self.told else missing
        return casual(rng, rng.choice(ask)), answer


def plain_text(rng: Random) -> str:
    """A text without roles, for clients that send a bare prompt."""
    kind = rng.random()
    if kind < 0.35:
        return " ".join(topic.answer for topic in rng.sample(TOKENPLANE, rng.randint(1, 3)))
    if kind < 0.45:
        return skills.story_of(rng.choice(ANIMALS), person(rng))
    kind_of_turn = rng.choice(["know", "sums", "small_talk"])
    if kind_of_turn == "know":
        ask, answer = skills.know(rng, rng.choice(TOKENPLANE + GENERAL))
    else:
        ask, answer = skills.sums(rng) if kind_of_turn == "sums" else skills.small_talk(rng)
    return f"{ask.strip()}\n{answer}"


class Encoder:
    """Turns chats into rows of ids, with a mask of the tokens that the model should learn to write."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.token_to_id(PAD)
        self.heads = {role: self.ids(f"{START}{role}\n") for role in ("system", "user", "assistant")}
        self.tail = self.ids(f"{END}\n")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def message(self, role: str, text: str) -> tuple[list[int], list[int]]:
        """Ids and mask of one message; only what the assistant says, with its end mark, is learned."""
        body = self.ids(text)
        learn = int(role == "assistant")
        ids = self.heads[role] + body + self.tail
        return ids, [0] * len(self.heads[role]) + [learn] * (len(body) + 1) + [0] * (len(self.tail) - 1)

    def echo(self, rng: Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One row of random ids that repeat after a few tokens; learned is everything but the first time."""
        period = round(math.exp(rng.uniform(math.log(2), math.log(length // 3))))  # short ones are learned first
        pattern = [rng.randrange(3, self.tokenizer.get_vocab_size()) for _ in range(period)]
        ids = (pattern * (length // period + 1))[:length]
        return np.array(ids), np.arange(length) >= period

    def row(self, rng: Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One row of `length` ids (int64) and its mask (bool): a chat of as many turns as fit."""
        ids: list[int] = []
        mask: list[int] = []
        if length <= 256 and rng.random() < 0.05:
            ids = (self.ids(plain_text(rng)) + self.tail[:1])[:length]
            mask = [1] * len(ids)
        chat = Chat(rng, rng.choice([None, None, None, None, "sums", "memory"]))
        if not ids and chat.system:
            ids, mask = self.message("system", chat.system)
        misses = 0
        while misses < 3 and len(ids) < length - 24:
            long_words = rng.randint(100, length // 4) if length >= 512 and rng.random() < 0.04 else 0
            ask, answer = chat.turn(long_words)
            parts = [self.message("user", ask), self.message("assistant", answer)]
            if len(ids) + sum(len(part[0]) for part in parts) > length:
                misses += 1
                continue
            for part_ids, part_mask in parts:
                ids, mask = ids + part_ids, mask + part_mask
        padding = length - len(ids)
        return np.array(ids + [self.pad_id] * padding), np.array(mask + [0] * padding, dtype=bool)

    def batches(self, seed: int, batch_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of about `batch_tokens` ids, [rows, length], for ever. Every batch has one row length."""
        rng = Random(seed)
        for batch in itertools.count():
            share = next(share for until, share in ECHO_SHARES if batch < until)
            length = rng.choices(list(ROW_SHARES), list(ROW_SHARES.values()))[0]
            makers = [
                self.echo if length <= 256 and rng.random() < share else self.row
                for _ in range(max(1, batch_tokens // length))
            ]
            rows = [make(rng, length) for make in makers]
            yield np.stack([ids for ids, _ in rows]), np.stack([mask for _, mask in rows])


def corpus(seed: int, chats: int) -> Iterator[str]:
    """Plain texts of many chats, to train the tokenizer."""
    rng = Random(seed)
    for _ in range(chats):
        yield "assistant"
        chat = Chat(rng)
        if chat.system:
            yield chat.system
        for _ in range(3):
            yield from chat.turn()
    for topic in TOKENPLANE + GENERAL:
        yield topic.answer
