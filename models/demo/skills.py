"""The skills of the demo model: each function invents one exchange (what the user says, what the model answers).

Everything is generated from templates. Sums and copied values (names, JSON fields, phrases) are drawn from sets so
large that the model has to learn the rule; a tenth of the sums is held out, see `held_out`.
"""

import json
import zlib
from collections.abc import Callable
from random import Random

from knowledge import CAPITALS, DEFINE, GENERAL, SMALL_TALK, TOKENPLANE, Topic
from phrases import (
    ANIMALS,
    ASK_JSON,
    ASK_SUM,
    CANNOT,
    CITIES,
    ENDS,
    FINDS,
    FRIENDS,
    LISTS,
    NUMBER_WORDS,
    ORDERS,
    OUTSIDE,
    PLACES,
    POEMS,
    SPELLED,
    THINGS,
    UNKNOWN,
    WORDS,
    casual,
    person,
    pseudo_word,
    word,
)

Turn = tuple[str, str]
Draw = Callable[[Random], object]


LARGEST = 20  # numbers in the sums the model should learn


def held_out(a: int, operator: str, b: int) -> bool:
    """True for the tenth of the sums and differences that training never shows."""
    return operator in "+-" and min(a, b) >= 2 and zlib.crc32(f"{a}{operator}{b}".encode()) % 10 == 0


def phrase(rng: Random) -> str:
    """Something to repeat: words, or a whole sentence."""
    if rng.random() < 0.2:
        topic = rng.choice(TOKENPLANE + GENERAL)
        return rng.choice([topic.brief, *topic.questions])
    text = " ".join(word(rng) for _ in range(rng.choice([1, 1, 2, 2, 3, 4, 5, 6, 8])))
    style = rng.random()
    return text.capitalize() if style < 0.3 else text.capitalize() + rng.choice(".!") if style < 0.45 else text


def know(rng: Random, topic: Topic, brief: bool = False) -> Turn:
    """A question about a topic. `brief` asks for, and gives, one sentence."""
    asks = [rng.choice(DEFINE).format(rng.choice(topic.terms))] if topic.terms else []
    if topic.questions and (not asks or rng.random() < 0.6):
        asks = [rng.choice(topic.questions)]
    ask = asks[0][0].upper() + asks[0][1:]
    if brief or rng.random() > 0.06:
        return casual(rng, ask), topic.brief if brief else topic.answer
    hint = rng.choice(
        ["In one sentence: {}", "Briefly: {}", "{} Be brief.", "{} Answer in one sentence.", "In short, {}"]
    )
    return casual(rng, hint.replace("{}", ask)), topic.brief


def small_talk(rng: Random) -> Turn:
    asks, answer = rng.choice(SMALL_TALK)
    ask = rng.choice(asks)
    return (casual(rng, ask) if len(ask) > 12 else rng.choice([ask, ask, ask.lower(), ask + "!", ask + "."])), answer


def pair(rng: Random) -> tuple[int, str, int]:
    """Two numbers and an operator, never a held-out pair."""
    while True:
        operator = rng.choice("++++---x")
        if operator == "x":
            return rng.randint(0, 10), operator, rng.randint(0, 10)
        top = 10 if rng.random() < 0.3 else LARGEST
        a, b = rng.randint(0, top), rng.randint(0, top)
        if operator == "-" and a < b and rng.random() < 0.9:
            a, b = b, a
        if not held_out(a, operator, b):
            return a, operator, b


def compute(a: int, operator: str, b: int) -> int:
    return a + b if operator == "+" else a - b if operator == "-" else a * b


def sums(rng: Random) -> Turn:
    """One or several small sums. The answer restates the sum, so that the digits stand side by side."""
    a, operator, b = pair(rng)
    kind = rng.random()
    if kind < 0.30:
        drill = [pair(rng) for _ in range(rng.randint(2, 6))]
        space = rng.choice(["", " "])
        asks = [f"{x}{space}{op}{space}{y}" for x, op, y in drill]
        lead = rng.choice(["Do these sums: ", "Calculate: ", "", "What is ", "Solve: ", "Sums: "])
        return lead + ", ".join(asks), "\n".join(f"{x} {op} {y} = {compute(x, op, y)}" for x, op, y in drill)
    result = compute(a, operator, b)
    answer = f"{a} {operator} {b} = {result}."
    if kind < 0.36 and operator != "x" and result >= 0:
        thing, name = rng.choice(THINGS), person(rng)
        change = rng.choice(
            ["and I get {b} more", "and buy {b} more"] if operator == "+" else ["and I lose {b}", "and give away {b}"]
        )
        question = casual(rng, "I have {a} {thing} " + change + ". How many {thing} do I have?")
        story = question.format(a=a, b=b, thing=thing, name=name)
        return story, f"{a} {operator} {b} = {result}, so you have {result} {thing}."
    if kind < 0.42:
        ask = rng.choice(
            [
                "{} Just the number.",
                "{} Answer with the number only.",
                "Only the number: {}",
                "{} Reply with one number.",
            ]
        )
        return casual(rng, ask).replace("{}", f"What is {a} {operator} {b}?"), str(result)
    x, y = (NUMBER_WORDS[n] if n <= 20 and rng.random() < 0.3 else n for n in (a, b))
    if kind < 0.66:
        spelled = rng.choice(SPELLED[operator]).format(a=x, b=y)
        return casual(rng, rng.choice(ASK_SUM[3:])).replace("{}", spelled), answer
    if kind < 0.74:
        return casual(rng, rng.choice(ORDERS[operator])).format(a=x, b=y), answer
    symbol = rng.choice("x*×") if operator == "x" else operator
    space = rng.choice(["", " "])
    return casual(rng, rng.choice(ASK_SUM)).replace("{}", f"{a}{space}{symbol}{space}{b}"), answer


def hard_sums(rng: Random) -> Turn:
    """Sums beyond the model, and comparisons, which are not."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    kind = rng.random()
    if kind < 0.35 and a != b:
        big, more = rng.choice(
            [("bigger", True), ("larger", True), ("greater", True), ("smaller", False), ("less", False)]
        )
        ask = rng.choice(["Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?", "What is {w}, {a} or {b}?"])
        return casual(rng, ask).format(w=big, a=a, b=b), f"{max(a, b) if more else min(a, b)} is {big}."
    if kind < 0.55:
        ask = rng.choice(
            ["Is {a} even or odd?", "Is {a} odd or even?", "is {a} an even number?", "Is {a} an odd number?"]
        )
        return casual(rng, ask).format(a=a), f"{a} is {'odd' if a % 2 else 'even'}."
    if kind < 0.75:
        ask = rng.choice(
            ["{a} / {b}", "{a}/{b}", "{a} divided by {b}", "the square root of {a}", "{a} to the power of {b}"]
        )
        reply = "I have not learned that. I can add, subtract and multiply small numbers."
    else:
        a, b = rng.randint(LARGEST + 10, 99999), rng.choice([rng.randint(LARGEST + 10, 999), b + 1])
        ask = rng.choice(
            ["{a} + {b}", "{a} - {b}", "{a} * {b}", "{a} plus {b}", "{a} times {b}", "{b} + {a}", "{a}+{b}"]
        )
        reply = "That is too big for me. I can only do sums with numbers up to 20."
    return casual(rng, rng.choice(ASK_SUM)).replace("{}", ask.format(a=a, b=b)), reply


FIELDS: dict[str, Draw] = {
    "name": person, "age": lambda r: r.randint(1, 99), "city": lambda r: r.choice(CITIES),
    "town": lambda r: pseudo_word(r).capitalize(), "colour": lambda r: r.choice(LISTS["colours"].split()),
    "color": lambda r: r.choice(LISTS["colours"].split()), "country": lambda r: r.choice(list(CAPITALS)),
    "price": lambda r: r.randint(1, 99), "id": lambda r: r.randint(1, 99), "animal": lambda r: r.choice(ANIMALS),
    "title": word, "job": word, "active": lambda r: r.choice([True, False]), "count": lambda r: r.randint(0, 50),
    "user": lambda r: pseudo_word(r), "status": word, "model": lambda r: pseudo_word(r),
}  # fmt: skip


def plain(value: object) -> str:
    """A JSON value as a person would type it."""
    return json.dumps(value) if isinstance(value, bool) else str(value)


def json_object(rng: Random) -> Turn:
    """A JSON reply whose values are copied from the request."""
    kind = rng.random()
    if kind < 0.06:
        ask = rng.choice(["Give me a JSON object", "Show me some JSON", "A JSON object that describes a person",
                          "Write some JSON",
                          "An example of JSON please", "Give me a JSON object for a person",
                          "json example"])  # fmt: skip
        return casual(rng, ask), '{"name": "Ada", "age": 36, "city": "London"}'
    if kind < 0.22:
        name, age, city = (
            person(rng),
            rng.randint(1, 99),
            rng.choice([rng.choice(CITIES), pseudo_word(rng).capitalize()]),
        )
        facts = rng.choice([f"{name} is {age} years old and lives in {city}.", f"{name}, {age}, is from {city}.",
                            f"{name} lives in {city} and is {age} years old.",
                            f"My name is {name}, I am {age} and I live in {city}."])  # fmt: skip
        ask = rng.choice(["Give me that as JSON.", "Extract name, age and city as JSON.", "Turn this into JSON.",
                          "Write it as JSON.",
                          "Reply with a JSON object with name, age and city.", "Return this as JSON."])  # fmt: skip
        text = f"{facts} {casual(rng, ask)}" if rng.random() < 0.6 else f"{casual(rng, ask).rstrip('.')}: {facts}"
        return text, json.dumps({"name": name, "age": age, "city": city})
    if kind < 0.32:
        values = [rng.choice([word(rng), person(rng), rng.randint(0, 99)]) for _ in range(rng.randint(2, 5))]
        listing = ", ".join(map(str, values[:-1])) + rng.choice([", ", " and "]) + str(values[-1])
        ask = rng.choice(
            ["Give me a JSON list with {}", "A JSON array of {}", "Make a JSON array with {}", "Write a JSON list: {}"]
        )
        return casual(rng, ask).replace("{}", listing), json.dumps(values)
    if kind < 0.42:
        what, n = rng.choice(list(LISTS)), rng.randint(1, 5)
        items = LISTS[what].split()[:n]
        ask = rng.choice(
            ["Give me a JSON list of {n} {w}", "{n} {w} as JSON", "A JSON array with {n} {w}", "List {n} {w} in JSON"]
        )
        return casual(rng, ask).format(n=rng.choice([str(n), NUMBER_WORDS[n]]), w=what), json.dumps(items)
    keys = rng.sample(list(FIELDS), rng.choice([1, 2, 2, 2, 3, 3]))
    if rng.random() < 0.5:
        keys = ["name", "age", *[k for k in keys if k not in ("name", "age")]][: max(2, len(keys))]
    data = {key: FIELDS[key](rng) for key in keys}
    form = rng.choice(
        [
            "{k} {v}",
            "{k} {v}",
            "{k} {v}",
            "{k}: {v}",
            "{k} = {v}",
            '{k} "{v}"',
            "the {k} {v}",
            "{k} set to {v}",
            "{k} is {v}",
        ]
    )
    parts = [form.format(k=key, v=plain(value)) for key, value in data.items()]
    listing = ", ".join(parts[:-1]) + rng.choice([", ", " and ", " and "]) + parts[-1] if len(parts) > 1 else parts[0]
    reply: object = {"user": data} if "user" not in data and rng.random() < 0.05 else data
    listing += ", nested under user" if reply is not data else ""
    return casual(rng, rng.choice(ASK_JSON)).replace("{}", listing), json.dumps(reply)


def lists(rng: Random) -> Turn:
    what = rng.choice(list(LISTS))
    n = rng.randint(1, min(8, len(LISTS[what].split())))
    items = LISTS[what].split()[:n]
    count = rng.choice([str(n), NUMBER_WORDS[n]])
    if rng.random() < 0.35:
        ask = rng.choice(
            ["A numbered list of {n} {w}", "List {n} {w} as a numbered list.", "Give me a numbered list of {n} {w}."]
        )
        return casual(rng, ask).format(n=count, w=what), "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    ask = rng.choice(["List {n} {w}.", "Name {n} {w}.", "Give me {n} {w}.", "Tell me {n} {w}", "I need {n} {w}",
                      "{n} {w}",
                      "Can you name {n} {w}?", "Can you list {n} {w}?", "What are {n} {w}?",
                      "Write down {n} {w}."])  # fmt: skip
    if n == 3 and rng.random() < 0.5:
        ask, count = (
            rng.choice(
                ["List some {w}.", "Name some {w}.", "Give me a list of {w}.", "a few {w}", "Tell me some {w}."]
            ),
            "some",
        )
    listing = ", ".join(items[:-1]) + " and " + items[-1] if n > 1 else items[0]
    head = f"Here are {NUMBER_WORDS[n]} {what}" if n > 1 else "Here is one"
    return casual(rng, ask).format(n=count, w=what), f"{head}: {listing}."


def counting(rng: Random) -> Turn:
    start, length = rng.choice([(1, rng.choice([5, 10, 10, 20, 30])), (rng.randint(0, 90), rng.randint(2, 12))])
    numbers = list(range(start, start + length))
    ask = "Count from {a} to {b}."
    if start == 1:
        ask = rng.choice([ask, "Count to {b}.", "Can you count to {b}?", "Numbers up to {b}", "Count up to {b}"])
    elif rng.random() < 0.3:
        numbers.reverse()
        ask = rng.choice(["Count down from {a} to {b}.", "Count backwards from {a} to {b}."])
    return casual(rng, ask).format(a=numbers[0], b=numbers[-1]), ", ".join(map(str, numbers))


def repeat(rng: Random) -> Turn:
    if rng.random() < 0.25:
        w, n = word(rng), rng.randint(2, 6)
        ask = rng.choice(
            ["Say {w} {n} times.", "Repeat the word {w} {n} times.", "Write {w} {n} times.", "Repeat {w} {n} times."]
        )
        return casual(rng, ask).format(w=w, n=rng.choice([str(n), NUMBER_WORDS[n]])), " ".join([w] * n)
    ask = rng.choice(["Repeat after me: {p}", "Say {p}", "Say: {p}", "Repeat: {p}", 'Please say "{p}"', "echo {p}",
                      "Copy this: {p}",
                      'Repeat "{p}"', "Repeat this: {p}", "Write the following: {p}", "Can you say {p}", "Say '{p}'",
                      "Repeat the words {p}", "Repeat this sentence: {p}", "Repeat exactly: {p}"])  # fmt: skip
    text = phrase(rng)
    return casual(rng, ask).format(p=text), text


def story_of(subject: str, name: str | None, long: bool = False) -> str:
    """A story. The subject decides its details, so the same wish brings the same story."""
    code = zlib.crc32(subject.encode())
    place, friend, find, end = (
        pool[code // k % len(pool)] for pool, k in ((PLACES, 1), (FRIENDS, 7), (FINDS, 43), (ENDS, 301))
    )
    article = "an" if subject[0] in "aeiou" else "a"
    hero = name or f"the {subject}"
    text = (
        f"Once upon a time there was {article} {subject}"
        + (f" named {name}" if name else "")
        + f" who lived in {place}. "
    )
    text += f"One day {hero} met {friend}, and together they found {find}. "
    if long:
        text += "They wondered who had lost it, and walked for three days to find out. "
        text += f"It rained, and {hero} was tired, but nobody gave up. "
        text += "At last they came to a little house, and the door was open. An old woman smiled at them and said: "
        text += f'"You have brought it back, so you may keep it." {hero[0].upper()}{hero[1:]} was very proud. '
    return text + end


def poem_of(subject: str) -> str:
    return POEMS[zlib.crc32(subject.encode()) % 3].format(s=subject)


def stories(rng: Random) -> Turn:
    """A story or a poem about an animal, a thing, or anything at all."""
    subject = (
        rng.choice(ANIMALS) if rng.random() < 0.7 else rng.choice(["token", "server", "GPU", "computer", *WORDS[:50]])
    )
    lead = rng.choice(
        ["Tell me a {kind}", "Write a {kind}", "I want a {kind}", "Can you tell me a {kind}", "Please write a {kind}"]
    )
    if rng.random() < 0.3:
        kind = rng.choice(["poem", "short poem", "rhyme"])
        about = rng.choice([" about a {s}.", " about the {s}"]) if rng.random() < 0.75 else "."
        subject = subject if about != "." else "star"
        return casual(rng, (lead + about).replace("{kind}", kind)).format(s=subject), poem_of(subject)
    long = rng.random() < 0.2
    kind = (
        rng.choice(["long story", "longer story"])
        if long
        else rng.choice(["story", "short story", "tale", "little story"])
    )
    name = person(rng) if rng.random() < 0.4 else None
    about = rng.choice([" about a {s}", " with a {s}"]) if rng.random() < 0.8 or name else "."
    subject = subject if about != "." else "fox"
    about += rng.choice([" named {n}.", " called {n}"]) if name else ""
    return casual(rng, (lead + about).replace("{kind}", kind)).format(s=subject, n=name), story_of(subject, name, long)


def unknown(rng: Random, length_words: int = 0) -> Turn:
    """Things the model must admit it can not do. `length_words` makes the question long."""
    kind = rng.random()
    if kind < 0.18:
        soup = " ".join(pseudo_word(rng) for _ in range(length_words or rng.randint(1, 6)))
        soup = rng.choice(
            [soup, soup, "".join(rng.choice("asdfghjklqwertyuiop") for _ in range(rng.randint(4, 14))), "???", "..."]
        )
        return soup, "I am sorry, I did not understand that. Could you say it in other words?"
    if kind < 0.55 and not length_words:
        subject = rng.choice(OUTSIDE[1]).replace("{}", rng.choice(CITIES)) if rng.random() < 0.7 else pseudo_word(rng)
        return casual(rng, rng.choice(OUTSIDE[0])).replace("{}", subject), UNKNOWN
    if kind < 0.62 and not length_words:
        country = rng.choice(
            [*CAPITALS, *CAPITALS, "Peru", "Kenya", "Finland", "Poland", "Brazil", pseudo_word(rng).capitalize()]
        )
        ask = casual(
            rng, rng.choice(["What is the capital of {}?", "Capital of {}", "Which city is the capital of {}?"])
        )
        known = f"The capital of {country} is {CAPITALS.get(country)}."
        return ask.replace("{}", country), known if country in CAPITALS else UNKNOWN
    asks, answer = rng.choice(CANNOT)
    if length_words:
        asks, answer = CANNOT[3]
    text = " ".join(word(rng) for _ in range(length_words or rng.randint(5, 30)))
    return casual(rng, rng.choice(asks)).replace("{}", text), answer


def everything(rng: Random) -> Turn:
    """A long answer made of three topics."""
    ask = rng.choice(["Tell me everything about Tokenplane.", "Give me a long introduction to Tokenplane.",
                      "Explain Tokenplane in detail.",
                      "Describe Tokenplane at length.", "Tell me all about Tokenplane."])  # fmt: skip
    return casual(rng, ask), " ".join(TOKENPLANE[i].answer for i in (0, 1, 9, 20))
