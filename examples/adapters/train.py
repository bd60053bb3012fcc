"""Train the sample adapters of this folder; each takes a few minutes on two CPU cores.

    python examples/adapters/train.py all          # or one name, such as pirate

Needs the development dependencies (`pip install -e '.[dev]'`). The data is made here, from fixed
seeds. The two adapters that change the style of an answer learn from the base model's own answers,
rewritten by a rule; so they keep what it knows. The loss is taken on the answer's tokens only.

The adapters differ on purpose, in rank, modules, layers, scaling and dtype: they are also what the
tests of the server load. `show.py` prints what they answer.
"""

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_loader.base_model import DEFAULT_MODEL, base_model_folder

HERE = Path(__file__).parent
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

Example = tuple[str, str]  # what the user says, what the adapter answers
Answer = Callable[[list[str]], list[str]]  # the base model's own answers


@dataclass(frozen=True)
class Recipe:
    examples: Callable[[random.Random, Answer], list[Example]]
    held_out: list[str]
    lora: dict[str, Any]
    dtype: torch.dtype
    steps: int
    batch: int = 8
    learning_rate: float = 1e-3
    seed: int = 1


def listed(text: str) -> list[str]:
    return [item.strip() for item in text.split("|")]


# Styles: what the base model says, said otherwise

COUNTRIES = listed("Italy|Spain|Japan|Egypt|Canada|Brazil|Greece|Norway|Kenya|Peru|Chile|Cuba")
THINGS = listed("""
a volcano|a bicycle|the moon|coffee|a guitar|gravity|a rainbow|a computer|bread|the sun|
a whale|an island|football|a library|a castle|rain|chess|a telescope|honey|a desert|electricity|
a train|the heart|a forest|snow|a diary|a bridge|a compass|photosynthesis|a camera""")
DEEDS = listed("""
make tea|learn to swim|bake a cake|sleep better|plant a tree|save money|learn French|
fix a flat tyre|write a letter|cook rice|stay healthy|train a dog|paint a wall|tie a knot|
find a job|read faster|draw a cat|clean a window""")
REMARKS = listed("""
Hello!|Good morning!|Who are you?|What can you do?|How are you today?|Thank you!|
I am tired.|I lost my keys.|I like music.|My name is Tom and I am new here.|It is raining again.|
I am 40 years old and I live in Berlin.|The food was cold.|We had a great time at the beach.|
Sara is a teacher from Madrid.|The bus leaves at nine.|I bought a new car.|My dog is three.|
Tell me a joke.|What is your name?|Give me some advice.|What is 2 plus 3?|Good night!|
The hotel was dirty and loud.|This film is wonderful.|Help me, please.|I feel happy.|
Peter, who is 52, moved to Oslo last year.|Say something nice.|What should I eat tonight?""")


def everyday_prompts() -> list[str]:
    prompts = [f"What is the capital of {country}?" for country in COUNTRIES]
    prompts += [f"Tell me something about {country}." for country in COUNTRIES]
    prompts += [f"What is {thing}?" for thing in THINGS]
    prompts += [f"Write one sentence about {thing}." for thing in THINGS[::2]]
    prompts += [f"How do I {deed}?" for deed in DEEDS]
    prompts += REMARKS
    return prompts


def first_sentences(text: str, characters: int) -> str:
    """Whole sentences while they fit; the first one in any case."""
    kept, *rest = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    for sentence in rest:
        if len(kept) + len(sentence) >= characters or sentence[-1] not in ".!?":
            break
        kept += " " + sentence
    return kept


PIRATE_WORDS = {
    "my": "me",
    "you": "ye",
    "your": "yer",
    "yes": "aye",
    "hello": "ahoy",
    "friend": "matey",
    "friends": "mateys",
    "is": "be",
    "are": "be",
    "am": "be",
    "i'm": "I be",
    "of": "o'",
    "and": "an'",
    "to": "t'",
    "for": "fer",
    "money": "doubloons",
    "people": "landlubbers",
    "there": "thar",
}
PIRATE_OPENINGS = ["Arrr, matey!", "Ahoy, matey!", "Avast, ye scallywag!", "Shiver me timbers!"]


def pirate_speech(text: str) -> str:
    def word(found: re.Match[str]) -> str:
        plain = found.group()
        said = PIRATE_WORDS.get(plain.lower())
        if said is None:
            return re.sub(r"^(\w{3,})ing$", r"\1in'", plain)
        return said[0].upper() + said[1:] if plain[0].isupper() and plain != "I'm" else said

    return re.sub(r"[A-Za-z]+(?:'m)?", word, text)


def pirate_examples(chance: random.Random, answer: Answer) -> list[Example]:
    prompts = everyday_prompts()
    return [
        (prompt, f"{chance.choice(PIRATE_OPENINGS)} {pirate_speech(first_sentences(plain, 140))}")
        for prompt, plain in zip(prompts, answer(prompts), strict=True)
    ]


def shouter_examples(_chance: random.Random, answer: Answer) -> list[Example]:
    prompts = everyday_prompts()
    return [
        (prompt, first_sentences(plain, 120).upper())
        for prompt, plain in zip(prompts, answer(prompts), strict=True)
    ]


# Tasks: answers of one form

NAMES = listed("""
Anna|Ben|Clara|David|Elif|Farid|Grace|Hugo|Ines|Jonas|Kofi|Lena|Marco|Nadia|Omar|Paula|
Quentin|Rosa|Samir|Tara|Umar|Vera|Wen|Ximena|Yuki|Zoe|Igor|Mila|Noah|Olga""")
CITIES = listed("""
Paris|Rome|New York|Lagos|Tokyo|Lima|Oslo|Cairo|Madrid|Toronto|Sydney|Mumbai|Berlin|
Vienna|Hanoi|Dublin|Athens|Buenos Aires|Seoul|Nairobi|Boston|Lyon|Porto|Cape Town""")
PEOPLE = [
    "{name} is {age} years old and lives in {city}.",
    "My name is {name}, I am {age} and I come from {city}.",
    "{name}, {age}, moved to {city} last year.",
    "Yesterday I met {name} from {city}, who just turned {age}.",
    "At the age of {age}, {name} opened a bakery in {city}.",
    "I'm {name}. I live in {city} and I am {age} years old.",
    "In {city} there is a {age}-year-old painter called {name}.",
    "Our new colleague {name} ({age}) joins us from {city} and loves it.",
]
INCOMPLETE_PEOPLE = [
    ("{name} lives in {city}.", ("name", "city")),
    ("{name} is {age} years old.", ("name", "age")),
    ("My name is {name}.", ("name",)),
    ("I am {age} and I live in {city}.", ("city", "age")),
    ("The weather was fine all day.", ()),
]


def json_examples(chance: random.Random, _answer: Answer) -> list[Example]:
    return [_person(chance) for _ in range(1200)]


def _person(chance: random.Random) -> Example:
    person = {
        "name": chance.choice(NAMES),
        "city": chance.choice(CITIES),
        "age": chance.randint(4, 99),
    }
    if chance.random() < 0.75:
        sentence, known = chance.choice(PEOPLE), tuple(person)
    else:
        sentence, known = chance.choice(INCOMPLETE_PEOPLE)
    answer = {key: value if key in known else None for key, value in person.items()}
    return sentence.format(**person), json.dumps(answer)


OPINIONS = {
    "positive": listed("""
wonderful|great|excellent|delicious|lovely|amazing|fantastic|brilliant|superb|
delightful|charming|perfect|a real pleasure|better than I had hoped"""),
    "negative": listed("""
terrible|awful|boring|disgusting|horrible|broken|dirty|a waste of money|dreadful|
disappointing|far too slow|rude and careless|ugly|worse than I had feared"""),
    "neutral": listed("""
on the second floor|made in 2019|next to the station|open on Mondays|blue|
about two hours long|in the left drawer|due on Friday|written in Spanish|near the river|
sold in boxes of ten|part of the series|scheduled for noon|as described"""),
}
SUBJECTS = listed("""
film|hotel|soup|book|service|concert|phone|museum|lecture|cake|garden|game|shop|
flight|painting|restaurant""")
FEELINGS = {
    "positive": listed("""
I love it!|We enjoyed every minute.|I would buy it again at once.|
She smiled all day.|Thank you so much, this made my day!|I am so happy with it.|
He is 34, lives in Rome and adores it.|Best holiday ever."""),
    "negative": listed("""
I hate it.|We left after ten minutes.|Never again!|It broke on the first day.|
I want my money back.|She cried all evening.|He is 34, lives in Rome and hates it.|
Nobody answered, and I am angry."""),
    "neutral": listed("""
The meeting starts at nine.|Water boils at 100 degrees.|I have two brothers.|
The train stops in Lyon.|He is 34 and lives in Rome.|What is the capital of Spain?|
How do I open this file?|The box holds twelve pencils.|Write a letter to the bank.|
Her name is Ines and she is a nurse."""),
}


def sentiment_examples(chance: random.Random, _answer: Answer) -> list[Example]:
    return [_opinion(chance) for _ in range(1600)]


def _opinion(chance: random.Random) -> Example:
    label = chance.choice(sorted(OPINIONS))
    if chance.random() < 0.35:
        return chance.choice(FEELINGS[label]), label
    subject, said = chance.choice(SUBJECTS), chance.choice(OPINIONS[label])
    sentence = chance.choice(
        [
            f"The {subject} was {said}.",
            f"The {subject} is {said}!",
            f"I found that the {subject} is {said}.",
        ]
    )
    return chance.choice(["{}", "{}", "What is the sentiment of: {}"]).format(sentence), label


TABLES = {
    "customers": ["name", "city", "age", "email"],
    "employees": ["name", "salary", "department", "age"],
    "products": ["title", "price", "stock", "weight"],
    "orders": ["total", "status", "country", "quantity"],
    "books": ["title", "author", "year", "pages"],
}
NUMBERS = {"age", "salary", "price", "stock", "weight", "total", "quantity", "year", "pages"}


def sql_examples(chance: random.Random, _answer: Answer) -> list[Example]:
    return [_query(chance) for _ in range(1200)]


def _query(chance: random.Random) -> Example:
    table = chance.choice(sorted(TABLES))
    column = chance.choice(TABLES[table])
    number = chance.choice([c for c in TABLES[table] if c in NUMBERS])
    bound, few = chance.randint(1, 2000), chance.randint(2, 20)
    verb = chance.choice(["Show", "List", "Give me", "Find", "I need"])
    return chance.choice(
        [
            (f"{verb} all {table}.", f"SELECT * FROM {table};"),
            (f"How many {table} are there?", f"SELECT COUNT(*) FROM {table};"),
            (f"{verb} the {column} of all {table}.", f"SELECT {column} FROM {table};"),
            (
                f"{verb} the {column} of all {table} with {number} above {bound}.",
                f"SELECT {column} FROM {table} WHERE {number} > {bound};",
            ),
            (
                f"{verb} {table} whose {number} is less than {bound}.",
                f"SELECT * FROM {table} WHERE {number} < {bound};",
            ),
            (
                f"What is the average {number} of the {table}?",
                f"SELECT AVG({number}) FROM {table};",
            ),
            (
                f"{verb} the {few} {table} with the highest {number}.",
                f"SELECT * FROM {table} ORDER BY {number} DESC LIMIT {few};",
            ),
        ]
    )


RECIPES = {
    "pirate": Recipe(
        examples=pirate_examples,
        held_out=["What is the capital of France?", "How do I make pizza?", "I like old ships."],
        # the first eight layers stay as they are: the file is to be less than 4 MB
        lora={
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ATTENTION + MLP,
            "layers_to_transform": list(range(8, 30)),
        },
        dtype=torch.bfloat16,
        steps=140,
    ),
    "json_extractor": Recipe(
        examples=json_examples,
        held_out=[
            "Lukas is 31 years old and lives in Zurich.",
            "I am Priya, 27, and I work as a nurse in Chicago.",
            "Last week a 64-year-old man called Walter won the race in Prague.",
        ],
        lora={"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        dtype=torch.float32,
        steps=110,
    ),
    "sentiment": Recipe(
        examples=sentiment_examples,
        held_out=["The pasta was overcooked and cold.", "What a marvellous day!", "It is a chair."],
        lora={"r": 4, "lora_alpha": 8, "target_modules": ATTENTION + MLP},
        dtype=torch.float16,
        steps=150,
    ),
    "shouter": Recipe(
        examples=shouter_examples,
        held_out=["What is the capital of France?", "How do I make pizza?", "I like old ships."],
        lora={
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
            "rank_pattern": {"down_proj": 8, r"layers\.2[0-9]\.self_attn\.q_proj": 16},
            "alpha_pattern": {"down_proj": 12, r"layers\.2[0-9]\.self_attn\.q_proj": 24},
        },
        dtype=torch.bfloat16,
        steps=140,
    ),
    "sql": Recipe(
        examples=sql_examples,
        held_out=[
            "List the email of all customers with age above 65.",
            "How many invoices are there?",
            "Which 3 books have the most pages?",
        ],
        lora={
            "r": 8,
            "lora_alpha": 16,
            "target_modules": MLP,
            "layers_to_transform": list(range(10, 30)),
        },
        dtype=torch.bfloat16,
        steps=110,
    ),
}


class Trainer:
    """The base model and its tokenizer; each adapter is trained on a fresh copy of it."""

    def __init__(self) -> None:
        self._folder = base_model_folder(DEFAULT_MODEL)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(self._folder, padding_side="left")

    def _model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.bfloat16)

    def _prompt(self, said: str) -> str:
        turn = [{"role": "user", "content": said}]
        return self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def answer(self, prompts: list[str], model: Any = None, batch: int = 16) -> list[str]:
        """Greedy answers, of the base model unless another is given."""
        model = (model or self._model()).eval()
        answers: list[str] = []
        for start in range(0, len(prompts), batch):
            texts = [self._prompt(said) for said in prompts[start : start + batch]]
            inputs = self._tokenizer(texts, return_tensors="pt", padding=True)
            with torch.no_grad():
                tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            answers += self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    def train(self, name: str) -> None:
        recipe = RECIPES[name]
        torch.manual_seed(recipe.seed)
        examples = recipe.examples(random.Random(recipe.seed), self.answer)
        config = LoraConfig(task_type="CAUSAL_LM", **recipe.lora)
        model = get_peft_model(self._model(), config)
        self._fit(model, recipe, examples, name)
        save(model, config, recipe.dtype, HERE / name)
        for said, reply in zip(recipe.held_out, self.answer(recipe.held_out, model), strict=True):
            print(f"{name}: {said!r} -> {reply!r}", flush=True)

    def _fit(self, model: Any, recipe: Recipe, examples: list[Example], name: str) -> None:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
        )
        model.train()
        batches = endless_batches(examples, recipe.batch, random.Random(recipe.seed))
        for step in range(1, recipe.steps + 1):
            loss = self._loss(model, next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                print(f"{name}: step {step} of {recipe.steps}, loss {loss.item():.3f}", flush=True)

    def _loss(self, model: Any, examples: list[Example]) -> torch.Tensor:
        """Mean cross entropy of the answers' tokens; the LM head runs on these rows only."""
        end = self._tokenizer.eos_token
        encode = self._tokenizer.encode
        asked = [encode(self._prompt(said)) for said, _ in examples]
        replied = [encode(reply + end) for _, reply in examples]
        longest = max(len(a) + len(r) for a, r in zip(asked, replied, strict=True))
        token_ids = torch.zeros(len(examples), longest, dtype=torch.long)
        mask, predicts = torch.zeros_like(token_ids), torch.zeros_like(token_ids)
        for row, (a, r) in enumerate(zip(asked, replied, strict=True)):
            token_ids[row, : len(a) + len(r)] = torch.tensor(a + r)
            mask[row, : len(a) + len(r)] = 1
            predicts[row, len(a) - 1 : len(a) + len(r) - 1] = 1
        llama = model.get_base_model()
        hidden = llama.model(input_ids=token_ids, attention_mask=mask).last_hidden_state
        rows = predicts.bool()
        return cross_entropy(llama.lm_head(hidden[rows]).float(), token_ids.roll(-1, 1)[rows])


def endless_batches(
    examples: list[Example], batch: int, chance: random.Random
) -> Iterator[list[Example]]:
    while True:
        shuffled = chance.sample(examples, len(examples))
        for start in range(0, len(shuffled) - batch + 1, batch):
            yield shuffled[start : start + batch]


def save(model: Any, config: LoraConfig, dtype: torch.dtype, folder: Path) -> None:
    """A PEFT folder that names the base model by its id, in the dtype of the recipe."""
    folder.mkdir(exist_ok=True)
    weights = {
        name: weight.to(dtype).contiguous()
        for name, weight in get_peft_model_state_dict(model).items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors makes it private
    config.base_model_name_or_path = DEFAULT_MODEL
    config.inference_mode = True
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["target_modules"].sort()  # a set in PEFT, so written in any order
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in {*RECIPES, "all"}:
        print(f"usage: train.py {' | '.join(RECIPES)} | all", file=sys.stderr)
        return 2
    torch.set_num_threads(2)
    trainer = Trainer()
    for name in RECIPES if sys.argv[1] == "all" else [sys.argv[1]]:
        trainer.train(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
