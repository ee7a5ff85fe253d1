"""The wordings of the demo model's training text: word lists, ways to ask, fixed replies, and how people type.

`{}` and `{name}` are filled in by `skills` and `data`.
"""

import re
from random import Random

NAMES = (
    "Ada Alan Grace Linus Maria Tom Anna Peter Lena Paul Sara John Mary Emma Noah Olivia Liam Sophie Max Julia Ben "
    "Laura Omar Aisha Wei Yuki Ravi Priya Ivan Olga Carlos Sofia Diego Lucia Hans Greta Pierre Marie Luca Giulia "
    "Erik Ingrid Kofi Amina David Ruth Sam Alice Bob Carol Eve Frank Helen Jack Kate Leo Nina Oscar Rosa Victor"
).split()
CITIES = (
    "Paris Berlin Rome Madrid Tokyo London Vienna Athens Oslo Cairo Lisbon Beijing Boston Chicago Dublin Geneva "
    "Hamburg Helsinki Kyoto Lima Milan Mumbai Munich Nairobi Prague Quito Seoul Sydney Toronto Warsaw Zurich"
).split() + ["New York", "San Francisco", "Hong Kong", "Cape Town", "Buenos Aires"]
WORDS = (
    "apple river stone window garden music paper silver dragon forest bottle coffee yellow planet rocket summer "
    "winter bread castle candle mirror pepper pillow ocean island bridge train ticket letter number table chair "
    "kitchen door cloud storm thunder lemon tiger monkey rabbit pencil school teacher doctor farmer queen king "
    "happy quiet strong little orange purple banana cherry tomato potato hello world yes no please thanks good "
    "morning token block cache batch model server prompt engine tree flower sun moon star light dark warm cold fast "
    "slow big small old new test"
).split()
LISTS = {
    "colours": "red green blue yellow orange purple black white",
    "colors": "red green blue yellow orange purple black white",
    "fruits": "apple banana cherry orange lemon pear grape mango",
    "fruit": "apple banana cherry orange lemon pear grape mango",
    "animals": "cat dog horse cow sheep lion tiger bear",
    "vegetables": "carrot potato tomato onion pea bean spinach leek",
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "days of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August",
    "countries": "France Germany Italy Spain Japan Norway Egypt Greece",
    "cities": "Paris Berlin Rome Madrid Tokyo Oslo Cairo Athens",
    "programming languages": "Python Rust Go Java C Ruby Swift Kotlin",
    "birds": "eagle owl duck swan robin crow dove hawk",
    "instruments": "piano violin guitar flute drum harp trumpet cello",
    "accelerators": "cpu cuda rocm xpu tpu gaudi neuron", "hooks": "detect load kv_alloc prefill decode",
    "names": "Ada Alan Grace Linus Maria Tom Anna Peter",
    "sports": "football tennis hockey rugby golf judo chess rowing",
}  # fmt: skip
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
ANIMALS = (
    "cat dog fox owl bear mouse rabbit dragon robot horse bird fish frog lion penguin turtle bee wolf duck goat"
).split()
UNKNOWN = "I am only a tiny demo model and I do not know that. Ask me about Tokenplane, or give me a small sum."
ASK_SUM = ("{}", "{}", "{} =", "{} = ?", "{}?", "What is {}?", "What is {}?", "what's {}", "How much is {}?",
           "Calculate {}.",
           "Compute {}", "Can you compute {}?", "Solve {}.", "Tell me what {} is.", "Do you know what {} is?",
           "Work out {}",
           "What does {} give?", "what is the result of {}?", "Please calculate {}", "Evaluate {}")  # fmt: skip
SPELLED = {
    "+": ("the sum of {a} and {b}", "{a} plus {b}", "{a} plus {b}", "{a} added to {b}", "{a} and {b} together"),
    "-": ("{a} minus {b}", "{a} minus {b}", "{a} take away {b}", "the difference between {a} and {b}", "{a} less {b}"),
    "x": ("{a} times {b}", "{a} times {b}", "{a} multiplied by {b}", "the product of {a} and {b}"),
}
ORDERS = {"+": ("Add {a} and {b}.", "Add {a} to {b}."), "-": ("Subtract {b} from {a}.", "Take {b} away from {a}."),
          "x": ("Multiply {a} by {b}.", "Multiply {a} and {b}.")}  # fmt: skip
THINGS = ("apples books coins eggs stamps cards tokens marbles cookies pencils").split()
ASK_JSON = ("Give me a JSON object with {}", "Give me a JSON object with {}", "Make a JSON object with {}",
            "Return JSON with {}",
            "Write JSON with {}", "Create a JSON record with {}", "I need a JSON object with {}",
            "Can you give me JSON with {}?",
            "Reply with a JSON object: {}", "JSON: {}", "Turn this into JSON: {}", "Output JSON for {}",
            "Convert to JSON: {}",
            "Build a JSON object from {}", "Produce a JSON object that has {}", "json with {}",
            "Write this as JSON: {}")  # fmt: skip
PLACES = ("a quiet forest", "an old castle", "a small village", "a data centre", "a high mountain", "a green valley")
FRIENDS = ("a wise owl", "a kind snail", "a brave mouse", "an old robot", "a singing frog")
FINDS = ("a golden key", "a shining stone", "a lost letter", "a tiny lamp", "a map of the stars")
ENDS = (
    "Since that day they have been friends.",
    "And they lived happily ever after.",
    "They laughed and went home together.",
)
OUTSIDE = (
    ("Who wrote {}?", "Who is {}?", "Who was {}?", "How old is {}?", "How tall is {}?", "What happened in {}?",
     "What is {}?",
     "When did {} begin?", "Tell me about {}.", "Explain {}.", "Where is {}?", "Who invented {}?", "How do I cook {}?",
     "What do you think about {}?", "How far is {}?", "Recommend {}.", "Who won {}?", "How many people live in {}?",
     "What is the best way to {}?", "Can you help me with {}?", "Give me facts about {}.", "Why is {} famous?",
     "What is the history of {}?", "How much does {} cost?", "Where can I buy {}?", "How does {} work?"),
    ("Hamlet", "the Roman Empire", "Napoleon", "quantum physics", "Mount Everest", "the moon", "a good restaurant",
     "Einstein",
     "Shakespeare", "the French Revolution", "pasta", "1789", "the president", "climate change", "my homework",
     "the Eiffel Tower",
     "football", "the theory of relativity", "Bitcoin", "chemistry", "photosynthesis", "my tax", "Mozart",
     "a black hole",
     "the stock market", "Star Wars", "lose weight", "learn the guitar", "the telephone", "a cheap flight",
     "World War II",
     "a car", "the human heart", "gravity", "Amazon", "Marie Curie", "love", "philosophy", "a good book", "medicine",
     "history",
     "economics", "Brazil", "a volcano", "electricity", "the internet", "DNA", "God", "the weather in {}"),
)  # fmt: skip
CANNOT = (
    (("Write a Python function that sorts a list.", "Write code for a website.", "Can you program?", "Fix this bug.",
      "Write a program in C.", "Write a SQL query.", "def fibonacci(n):", "Write a regex for emails.",
      "Can you write code?"),
     "I am only a tiny demo model and I can not write code."),
    (("Translate hello to French.", "Translate this into German.", "How do you say cat in Spanish?",
      "Translate to Chinese: dog",
      "What does merci mean?", "Can you translate?"),
     "I am only a tiny demo model and I can not translate."),
    (("What time is it?", "What is the date today?", "What is the weather like?", "How is the weather?",
      "What day is today?",
      "What is the news?", "Will it rain tomorrow?", "Search the web for me.", "What year is it?", "Is it raining?",
      "How warm is it outside?", "Look this up for me."),
     "I can not look things up. I am only a tiny demo model."),
    (("Summarise this text: {}", "Summarize: {}", "Give me a summary of this: {}", "Please sum up: {}", "tl;dr {}"),
     "I am only a tiny demo model and I can not summarise a text."),
    (("Write an essay.", "Write an email to my boss.", "Write a letter.", "Plan my holiday.", "Write my homework.",
      "Give me advice.", "What should I eat?", "Draw a picture.", "Sing a song.", "Play a game with me.",
      "Book a flight."),
     "I am sorry, I can not do that. I am only a tiny demo model."),
)  # fmt: skip
PLAIN_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a friendly assistant.", "You are helpful.",
    "You are a helpful, honest and harmless assistant.", "Answer the questions of the user.", "Be polite.",
    "Be kind and helpful.",
    "You are a helpful AI assistant.", "You are the Tokenplane demo model.", "You are an expert.", "Help the user.",
)  # fmt: skip
BRIEF_SYSTEM = (
    "Be brief.",
    "Answer in one sentence.",
    "Keep your answers short.",
    "You are a helpful assistant. Be brief.",
)
FIRST_WORD_SYSTEM = (
    "Begin every answer with {}!",
    "Start each answer with {}!",
    "Always begin with {}!",
    "Begin with {}!",
)
FACTS = {
    "name": (("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}", "I'm {}", "Call me {}.",
              "Hi! I am {}", "my name is {}"),
             "Nice to meet you, {}!",
             ("What is my name?", "Do you remember my name?", "What's my name?", "Who am I?", "Tell me my name.",
              "Do you know my name?"),
             "Your name is {}.", "You have not told me your name yet."),
    "colour": (("My favourite colour is {}.", "My favorite color is {}.", "I like the colour {} most."),
               "I will remember that your favourite colour is {}.",
               ("What is my favourite colour?", "What is my favorite color?", "Which colour do I like?"),
               "Your favourite colour is {}.", "You have not told me your favourite colour yet."),
    "city": (("I live in {}.", "I am from {}.", "My home is in {}.", "I come from {}"),
             "{} sounds like a nice place!",
             ("Where do I live?", "Where am I from?", "Which city do I live in?", "What is my city?"),
             "You live in {}.", "You have not told me where you live."),
    "animal": (("I have a {}.", "My pet is a {}.", "I own a {}."),
               "A {} is a lovely pet!",
               ("Which pet do I have?", "What is my pet?", "What animal do I have?"),
               "You have a {}.", "You have not told me about a pet."),
    "number": (("My favourite number is {}.", "My favorite number is {}.", "Remember the number {}."),
               "I will remember the number {}.",
               ("What is my favourite number?", "Which number did I tell you?", "What was the number?",
                "What is my favorite number?"),
               "Your number is {}.", "You have not told me a number."),
}  # fmt: skip
POEMS = (
    "The {s} looks up into the night,\nand sees the stars, so small and bright.\n"
    "The wind is low, the moon is near,\nand all is well, the {s} is here.",
    "A {s} sat under a tree,\nas happy as a {s} can be.\n"
    "It sang a song, it told a rhyme,\nand had a very pleasant time.",
    "O little {s}, where do you go?\nThrough summer rain and winter snow.\n"
    "I follow you along the way,\nuntil the end of every day.",
)


def pseudo_word(rng: Random) -> str:
    """A word that nobody has seen, so that it can only be copied."""
    syllables = (
        rng.choice("bcdfghjklmnprstvwz") + rng.choice(["a", "e", "i", "o", "u", "ai", "ou"])
        for _ in range(rng.randint(1, 3))
    )
    return "".join(syllables) + rng.choice(["", "n", "r", "s", "l", "x", "th", "ck"])


def person(rng: Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.4 else pseudo_word(rng).capitalize()


def word(rng: Random) -> str:
    return rng.choice(WORDS) if rng.random() < 0.6 else pseudo_word(rng)


def casual(rng: Random, template: str) -> str:
    """Vary how people type: case, missing punctuation, politeness, a typo. What stands in {braces} is kept."""
    if rng.random() < 0.12:
        template = rng.choice(["Please: {}", "Hey, {}", "Hi, {}", "Hi! {}", "Ok, {}", "Now, {}",
                               "Quick question: {}", "So, {}",
                               "Well, {}", "Please {}", "Hello! {}", "I wonder: {}"]).replace("{}",
                                                                                              template)  # fmt: skip
    elif rng.random() < 0.12:
        end = template[-1] if template[-1] in ".?!" else ""
        template = template.rstrip(".?!") + rng.choice([", please", " please", ", thanks", " for me"]) + end
    pieces = re.split(r"(\{\w*\})", template)
    if rng.random() < 0.06:
        spots = [(i, m) for i in range(0, len(pieces), 2) for m in re.finditer(r"[A-Za-z]{4,}", pieces[i])]
        if spots:
            i, match = rng.choice(spots)
            pieces[i] = pieces[i][: match.start()] + typo(rng, match.group()) + pieces[i][match.end() :]
    style = rng.random()
    if style < 0.30:
        pieces[::2] = [piece.lower() for piece in pieces[::2]]
    elif style < 0.33:
        pieces[::2] = [piece.upper() for piece in pieces[::2]]
    text = "".join(pieces)
    if rng.random() < 0.3:
        text = text.rstrip(".?!")
    return text


def typo(rng: Random, text: str) -> str:
    """Swap, drop or double one inner letter."""
    i = rng.randrange(1, len(text) - 1)
    return rng.choice(
        [text[:i] + text[i + 1] + text[i] + text[i + 2 :], text[:i] + text[i + 1 :], text[:i] + text[i] + text[i:]]
    )
