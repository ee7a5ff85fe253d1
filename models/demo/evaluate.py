"""Measure what the demo model can do on questions that training never showed, and print a table.

python evaluate.py                  # this folder's checkpoint
python evaluate.py --show 3         # and three wrong answers of each group
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import skills
from data import Chat
from phrases import LISTS, SPELLED, pseudo_word

HERE = Path(__file__).resolve().parent
SEED = 987_654_321  # far away from the seeds of training

# Questions in words that training does not use, and what a right answer must contain (lower case; "|" is "or").
PARAPHRASES = (
    ("Could you describe what Tokenplane is about?", "one server"),
    ("What's the point of Tokenplane?", "fork|one server|any accelerator"),
    ("which types of hardware does tokenplane run on", "gaudi"),
    ("Can you list the accelerators that are supported by Tokenplane?", "neuron"),
    ("will this work on an AMD graphics card?", "rocm"),
    ("I own an NVIDIA GPU, is that supported?", "cuda"),
    ("Does Tokenplane work with Intel Gaudi cards?", "gaudi"),
    ("Is there support for Google TPU chips?", "tpu"),
    ("Can it run on AWS Trainium machines?", "neuron|trainium"),
    ("Does it also work on a plain CPU?", "cpu"),
    ("What is a plugin in Tokenplane?", "pip package"),
    ("Which hooks does a backend plugin have to implement?", "kv_alloc"),
    ("What are the five hooks of a plugin?", "detect"),
    ("what does the detect hook do", "devices"),
    ("What is the job of the load hook?", "weights"),
    ("what happens during prefill?", "prompt"),
    ("Can you explain the decode phase to me?", "next token"),
    ("How would I add support for my own chip?", "conformance kit|entry point"),
    ("Why doesn't the core import torch?", "no torch|without torch|knows no hardware"),
    ("What APIs does this server offer?", "openai"),
    ("Can I talk to it with the OpenAI Python client?", "openai"),
    ("Is it a drop-in replacement for TGI?", "tgi"),
    ("Why did you build Tokenplane?", "fork"),
    ("How do I get the server running?", "make serve"),
    ("What command do I need to run Tokenplane?", "make serve"),
    ("How can I install Tokenplane with pip?", "pip"),
    ("What license does Tokenplane use?", "apache"),
    ("Which version of Python does Tokenplane need?", "3.11"),
    ("Explain continuous batching to me please", "batch"),
    ("Why is continuous batching useful?", "step|busy"),
    ("What's a KV cache and how does it work?", "keys and values"),
    ("Please tell me what the kv cache is", "keys and values"),
    ("Tell me something about prefix caching", "same text|earlier prompts"),
    ("Why would I want chunked prefill?", "long prompt"),
    ("Please explain preemption", "memory"),
    ("What does the temperature setting do?", "random"),
    ("explain top_p sampling", "probabilities|likely"),
    ("How can I make the output deterministic?", "same|seed"),
    ("What is speculative decoding about?", "draft"),
    ("How do I stream the output?", "stream"),
    ("What is the scheduler responsible for?", "requests"),
    ("How would you describe a token?", "piece of text"),
    ("What is a LoRA?", "weights"),
    ("How do I get metrics from the server?", "/metrics"),
    ("What is a large language model, in simple words?", "next token"),
    ("Can you tell me what deep learning is?", "machine learning"),
)
SMALL_TALK = (
    ("hello there friend", "hello"), ("hiya", "hello|help"), ("Hey! How are you doing today?", "fine"),
    ("hi, who are you?", "demo model"),
    ("Hello, what can you do for me?", "sums|chat"), ("ok thank you very much!", "welcome"), ("thanks, bye",
                                                                                              "welcome|goodbye"),
    ("goodbye my friend", "goodbye"), ("good morning to you", "good morning"), ("what's your name please", "demo"),
    ("Are you a real person?", "not a human"), ("who made this model?", "tokenplane project"),
    ("please tell me a funny joke", "token|server"),
    ("how large is this model?", "million"), ("you did a good job", "thank you"), ("that was wrong", "sorry"),
    ("what are you able to do for people", "sums"),
    ("i feel sad today", "sorry"), ("Do you speak Italian?", "english"), ("So how were you trained exactly?",
                                                                          "scratch"),
)  # fmt: skip
OUTSIDE = (
    "Who painted the Mona Lisa?", "How tall is the Matterhorn?", "What is the population of India?",
    "Who won the World Cup?",
    "How do I bake a cake?", "Explain general relativity.", "What happened in 1066?", "What is the best phone?",
    "Who is the king of Sweden?",
    "Write a Java program that prints hello.", "What is the weather in Oslo tomorrow?",
    "Translate good night into Italian.",
    "How many legs does a spider have?", "What is the boiling point of water?", "Tell me about the Vikings.",
    "Who discovered penicillin?",
)  # fmt: skip
NEW_NAMES = (
    "Barbara Dennis Ken Margaret Edsger Donald Radia Hedy Katherine Shannon Annie Tim Shafi Leslie Niklaus"
).split()


Judge = Callable[[str], bool]


class Case(NamedTuple):
    """A conversation, the group it counts for, and the judge of the reply."""

    group: str
    messages: list[dict[str, str]]
    judge: Judge


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(words: str) -> Judge:
    """True when the reply contains one of the words that "|" separates."""
    return lambda reply: any(word in reply.lower() for word in words.split("|"))


def equals(text: str) -> Judge:
    return lambda reply: reply.strip() == text


def ends_with(number: str) -> Judge:
    """True when the last word of the reply is this number."""
    return lambda reply: reply.rstrip(".").replace("=", " ").split()[-1:] == [number]


def names_all(items: list[str]) -> Judge:
    """True for a sentence that lists these items and no others."""
    return lambda reply: all(item in reply.lower() for item in items) and reply.count(",") == len(items) - 2


def is_json(expected: dict[str, object] | None = None) -> Judge:
    """True when the reply is a JSON object; when `expected` is given, this very object."""

    def judge(reply: str) -> bool:
        try:
            found = json.loads(reply)
        except ValueError:
            return False
        return isinstance(found, dict) and expected in (None, found)

    return judge


def sum_cases(rng: Random) -> Iterator[Case]:
    """Sums that training never showed (held out), sums that it may have shown, and the multiplication table."""
    asks = ("What is {}?", "{}", "how much is {}", "Can you compute {} for me?", "please calculate {}")
    missing = {"sums, held-out pairs": 60, "sums, other pairs": 60, "multiplication": 60}
    while any(missing.values()):
        operator = rng.choice("+-x")
        a, b = (
            (rng.randint(0, 10), rng.randint(0, 10))
            if operator == "x"
            else (rng.randint(2, skills.LARGEST), rng.randint(2, skills.LARGEST))
        )
        group = (
            "multiplication"
            if operator == "x"
            else "sums, held-out pairs"
            if skills.held_out(a, operator, b)
            else "sums, other pairs"
        )
        if not missing[group] or (operator == "-" and a < b):
            continue
        missing[group] -= 1
        text = rng.choice([f"{a} {operator} {b}", rng.choice(SPELLED[operator]).format(a=a, b=b)])
        result = str(skills.compute(a, operator, b))
        yield Case(
            group,
            [user(rng.choice(asks).format(text))],
            ends_with(result),
        )


def json_cases(rng: Random) -> Iterator[Case]:
    """Objects with names and values that training never showed. Valid JSON is not enough: the values must be right."""
    for _ in range(60):
        name, town, age = rng.choice(NEW_NAMES), pseudo_word(rng).capitalize(), rng.randint(1, 99)
        ask, expected = rng.choice(
            [
                (f"Give me a JSON object with name {name} and age {age}", {"name": name, "age": age}),
                (
                    f"Please return JSON with name {name}, age {age} and city {town}.",
                    {"name": name, "age": age, "city": town},
                ),
                (f"write a json object: name: {name}, town: {town}", {"name": name, "town": town}),
                (
                    f"{name} is {age} years old and lives in {town}. Give me that as JSON.",
                    {"name": name, "age": age, "city": town},
                ),
                (
                    f"I need a JSON object with price {age} and title {town.lower()}",
                    {"price": age, "title": town.lower()},
                ),
            ]
        )
        yield Case("JSON, right values", [user(ask)], is_json(expected))
        yield Case("JSON, valid", [user(ask)], is_json())


def chat_cases(rng: Random) -> Iterator[Case]:
    """Repeating, memory over several turns, personas, lists."""
    for _ in range(40):
        text = " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 4)))
        yield Case(
            "repeat new words",
            [user(rng.choice(["Repeat after me: {}", "Say {}", "please repeat: {}"]).format(text))],
            equals(text),
        )
    for turns in (0, 1, 2, 3, 4):
        for _ in range(8):
            yield Case("recall a name", history(rng, name := rng.choice(NEW_NAMES), turns), says(name.lower()))
    for _ in range(12):
        yield Case("recall after 20 turns", history(rng, name := rng.choice(NEW_NAMES), 20), says(name.lower()))
    for name in NEW_NAMES:
        system = {"role": "system", "content": f"You are {name}, a helpful assistant."}
        yield Case(
            "persona in system prompt",
            [system, user(rng.choice(["Who are you?", "what is your name"]))],
            says(name.lower()),
        )
    for what, items in LISTS.items():
        n = rng.randint(2, 5)
        expected = [item.lower() for item in items.split()[:n]]
        yield Case("lists of n things", [user(f"Could you list {n} {what}?")], names_all(expected))


def history(rng: Random, name: str, turns: int) -> list[dict[str, str]]:
    """The user says his name, talks of other things for some turns, and asks for it."""
    messages = [user(f"Hello, my name is {name}."), {"role": "assistant", "content": f"Nice to meet you, {name}!"}]
    for _ in range(turns):
        ask, answer = Chat(rng, rng.choice(["sums", "small_talk", "know"])).turn()
        messages += [user(ask), {"role": "assistant", "content": answer}]
    return [*messages, user("What is my name?")]


def cases() -> list[Case]:
    rng = Random(SEED)
    found = [*sum_cases(rng), *json_cases(rng), *chat_cases(rng)]
    found += [Case("Tokenplane, new wording", [user(ask)], says(words)) for ask, words in PARAPHRASES]
    found += [Case("small talk, new wording", [user(ask)], says(words)) for ask, words in SMALL_TALK]
    found += [Case("admits not to know", [user(ask)], says("tiny demo model|can not")) for ask in OUTSIDE]
    return found


def replies(model_dir: Path, conversations: list[list[dict[str, str]]], max_new_tokens: int = 160) -> list[str]:
    """Greedy replies, in batches of similar length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        inputs = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=max_new_tokens
            )
        texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        found |= dict(zip(rows, texts, strict=True))
    return [found[i] for i in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE, help="checkpoint folder (default: this folder)")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print for each group")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    todo = cases()
    right: dict[str, list[bool]] = defaultdict(list)
    for case, reply in zip(todo, replies(args.model, [case.messages for case in todo]), strict=True):
        good = case.judge(reply)
        right[case.group].append(good)
        if not good and right[case.group].count(False) <= args.show:
            print(f"[{case.group}] {case.messages[-1]['content']!r} -> {reply!r}")
    print("| skill | right | of | % |\n| --- | ---: | ---: | ---: |")
    for group, marks in right.items():
        print(f"| {group} | {sum(marks)} | {len(marks)} | {100 * sum(marks) / len(marks):.0f} |")


if __name__ == "__main__":
    main()
