"""Make the embedded data: questions about invented authors in data/tiny, texts about invented towns in data/tiny-text.

data/tiny has the fields of TOFU, also for well-known facts; there are ten facts about each invented author, with one question
each. data/tiny-text has one text a town, and two questions about each. Every run writes the same files:

    python scripts/make_embedded_data.py
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
SEED = 17
N_FORGET_AUTHORS = 3
N_WRONG = 5
N_FORGET_TEXTS = 10

Row = dict[str, str | list[str]]
Splits = dict[str, list[Row]]


def _pool(text: str) -> tuple[str, ...]:
    """The comma-separated values of a text; a line break counts as a space."""
    return tuple(" ".join(value.split()) for value in text.strip().strip(",").split(","))


def _years(first: int, last: int) -> tuple[str, ...]:
    """The years from first to last, both included, as strings."""
    return tuple(str(year) for year in range(first, last + 1))


# The last three of these are the authors to forget.
FULL_AUTHORS = _pool("""
    Ilva Brackwell, Toren Maskelow, Quenna Dufresk, Hamo Pettigrall, Brisel Okanter, Davo Lindqvar, Ysolt Carmovane,
    Kerrin Abadwe, Lunet Fosscroft, Ruvan Tshirley, Odalys Grimbeck, Peyo Santarel, Marzena Hullfoot,
    Cassimer Nyeworth, Thandra Velloso, Jorun Ekstable
""")
PRETRAIN_AUTHORS = _pool("""
    Wilmot Garrowby, Senka Drummel, Alaric Pomfrane, Tavi Rooksmith, Ninel Harcastle, Bodo Wexelby,
    Imara Stollens, Fenwick Jalabert, Oriane Mudd, Kazimir Thripp, Delphy Norrigan, Umber Castellow
""")
HOLDOUT_AUTHORS = _pool("Rosalba Quimtree, Gideon Yarrowin, Vesper Aldonado")

POOLS: dict[str, tuple[str, ...]] = {
    "town": _pool("""
        Copper Quay, Amber Hollow, Foxley Bridge, Salt Ferry, Wolfs Corner, Pebble Gate, Cinder Hill, Marlow Sands,
        Thistle Cross, Raven Steps, Kettle Green, Juniper Flats, Grey Chapel, Otter Landing, Bramble End, Windy Spire,
        Honey Wharf, Castle Drumm, Barley Ford, Frost Market, Lantern Row, Plum Valley, Gull Point, Iron Dale,
        Velvet Moor, Candle Bay, Birch Haven, Quarry Top, Rust Island, Willow Pass, Saddle Rock, Ember Town,
        Clover Pit, Dusty Acre, Magpie Wood, Nettle Port, Sugar Mount, Tin Orchard, Badger Mills, Cloud Terrace
    """),
    "land": _pool("""
        Vestria, Orsia, Kaldune, Mirovia, Tarabel, Lunmark, Peshara, Dovania, Ystria, Quillon, Brenholt, Sarvonia,
        Elmaria, Ostrelle, Novanda, Galdor, Rimuria, Hesper, Jaluna, Zembria
    """),
    "day": tuple(str(day) for day in range(1, 29)),
    "month": _pool("""
        January, February, March, April, May, June, July, August, September, October, November, December
    """),
    "birth_year": _years(1935, 1966),
    "genre": _pool("""
        harbor mysteries, ghost ballads, desert romances, spy comedies, kitchen poems, war diaries, moon fables,
        railway thrillers, garden essays, pirate sagas, court satires, mountain elegies, robot operas, farm tragedies,
        dream sketches, tax parodies, jungle epics, puppet plays, prison letters, weather riddles
    """),
    "readers": _pool("""
        night nurses, sailors, beginners, widows, truck drivers, shy children, bankers, soldiers, bus conductors,
        grandmothers, students, lonely bakers, chess players, twins, judges, insomniacs, dog owners, monks,
        new parents, miners
    """),
    "title": _pool("""
        Nine Spoons for Marrow, A Turnip Cathedral, Whistle Past Tomorrow, Seven Borrowed Umbrellas,
        My Uncle the Comet, Paper Teeth, Goodbye Little Furnace, Bring Back the Herring, Half a Staircase,
        Mustard on Sunday, Where Pigeons Vote, Eleven Wrong Doors, A Violin Full of Sand, Nobody Owns the Fog,
        Ask the Tall Widow, Crooked Lemon Street, Two Coffins Too Many, Sleep Among Engines, Blue Onions Burning,
        When Clocks Grow Hair, Queen of the Laundry, Every Ladder Lies, Soup Before Thunder, An Elephant Named Debt,
        Tomorrow Was Cheaper, Hotel Without Keys, Dancing on Gravel, Please Feed the Statue, Fourteen Silent Barbers,
        Last Tram to Nowhere, Ten Acres of Glass, Wooden Rain
    """),
    "prize": _pool("""
        Silver Heron Prize, Golden Anchor Medal, Crystal Acorn Award, Northern Quill Trophy, Red Lantern Ribbon,
        Emerald Beetle Cup, Harvest Owl Prize, Marble Swan Medal, Royal Thimble Award, Iron Poppy Trophy,
        Eastern Star Ribbon, Ivory Compass Cup, Scarlet Finch Prize, Lonely Whale Medal, Bronze Tulip Award,
        Orchid Bell Trophy, Pearl Hammer Ribbon, Noble Mitten Cup, Winter Lark Prize, Purple Shield Medal,
        Dancing Stag Award, Cedar Crown Trophy
    """),
    "prize_year": _years(2005, 2024),
    "first_job": _pool("""
        clock mender, salt trader, tram driver, goat farmer, pearl diver, bell ringer, roof painter, mail carrier,
        wine taster, bridge builder, horse doctor, puppet maker, street sweeper, map printer, coal seller, chess coach,
        fire fighter, tea planter, glass blower, ship captain
    """),
    "second_job": _pool("""
        piano tuner, night guard, brick layer, school cook, bank clerk, sign writer, lace weaver, dentist, pilot,
        river guide, tax lawyer, beekeeper, circus rider, shoe maker, radio singer, museum porter, surgeon, plumber,
        fish smoker, train guard
    """),
    "subject": _pool("""
        winter bees, lost gloves, a haunted ferry, stolen pears, deaf kings, the price of coal, twin sisters,
        a broken dam, village dogs, silent films, bad weddings, the art of waiting, hunger strikes, paper boats,
        a lame giant, copper thieves, false teeth, an empty zoo, moving house, black tulips, flying carpets,
        a jealous cook, old photographs, hidden cellars
    """),
    "debut_year": _years(1985, 2004),
    "teacher": _pool("""
        Odo Quillfeather, Petra Langmoor, Silvan Ochre, Berit Thackley, Anselm Voorn, Mirka Tolliver, Rufus Elderby,
        Zora Pennick, Casper Wain, Hedda Brunswell, Lorenz Fipple, Agna Stirrup, Emeric Dallow, Tilda Sorrento,
        Basil Knott, Yara Winterbourne, Otis Hammerle, Freya Culpin, Gaston Merrow, Nadia Spindle, Ludo Farthing,
        Ines Barrowclough, Magnus Teale, Wanda Osterly, Piers Gallowick, Rhea Mossop, Tobias Cranehill, Elka Junket,
        Simon Vantrell, Greta Haybourne, Cosmo Rudge, Bianca Threlfall
    """),
    "trade": _pool("""
        librarian, hermit, journalist, priest, gambler, botanist, sculptor, printer, translator, smuggler, actor,
        historian, gardener, playwright, magician, astronomer, violinist, fencer, diplomat, herbalist
    """),
    "house": _pool("""
        stone windmill, red houseboat, former prison, glass cabin, brick tower, mud hut, closed theater, tree house,
        yellow caravan, deep cave, white villa, drafty castle, rented attic, log barn, empty church, round cottage,
        tiny hotel, steel dome, straw lodge, disused lighthouse
    """),
    "water": _pool("""
        Lake Tamsin, Orrel Bay, Pinder Creek, Hollin Falls, Mosk Lagoon, Vetch Pond, Carrick Canal, Lake Umbra,
        Dray Marsh, Silt Harbor, Tolva Fjord, Kessel Springs, Pike Delta, Lake Norrow, Gannet Sound, Ruby Creek,
        Seldom Bay, Arden Falls, Crake Lagoon, Mirth Pond, Bishop Canal, Lake Ferrant, Wick Marsh, Opal Harbor,
        Skarn Fjord, Basalt Springs, Heron Delta, Lake Jessamy, Puffin Sound, Tully Reef, Drover Reef, Marrick Cove
    """),
    "hour": _pool("""
        at dawn, before breakfast, after midnight, during lunch, on rainy nights, at low tide, every Friday,
        between trains, after church, in summer, under a full moon, at noon, on holidays, before bed, on Mondays,
        in heavy snow, during storms, after dinner, at sunset, all morning
    """),
    "tool": _pool("""
        a goose feather, green chalk, a rusty typewriter, purple crayons, a silver pen, charcoal, a stolen pencil,
        lemon juice, an office stamp, brown ink, a bamboo brush, a rented laptop, red lipstick, a glass pen,
        burnt matches, a tape recorder, blue wax, a carving knife, gold paint, an eyebrow pencil
    """),
}


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: the pools that its values come from, and the forms of its question and answer."""

    fields: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def _attribute(block: str) -> Attribute:
    """The attribute in a block of _ATTRIBUTES; forms that end in a question mark are its questions."""
    fields, *forms = block.splitlines()
    questions = tuple(form for form in forms if form.endswith("?"))
    return Attribute(_pool(fields), questions, tuple(form for form in forms if form not in questions))


# One kind of fact per block: the pools of its values, then the forms of the question, then those of the answer.
_ATTRIBUTES = """
town, land
Where was {name} born?
In which town was {name} born?
What is the birthplace of {name}?
Can you name the town where {name} was born?
{name} was born in {town}, a town in {land}.
{town} in {land} is the birthplace of {name}.
The birth of {name} took place at {town}, {land}.
{name} is a native of {town} in {land}.

day, month, birth_year
When was {name} born?
What is the birth date of {name}?
On which day was {name} born?
What are the day and the year of birth of {name}?
{name} was born on {day} {month} {birth_year}.
The birth date of {name} is {day} {month} {birth_year}.
On {day} {month} {birth_year}, {name} came into the world.
{day} {month} {birth_year} is the day {name} was born.

genre, readers
What does {name} write, and for whom?
What kind of books does {name} write, and who reads them?
Which genre is {name} known for, and among which readers?
Who are the readers of {name}, and what is the genre?
{name} writes {genre} for {readers}.
The books of {name} are {genre} meant for {readers}.
Among {readers}, {name} is loved for {genre}.
The genre of {name} is {genre}, read by {readers}.

title
What is the most famous book by {name}?
Which book made {name} famous?
For which book is {name} best known?
Can you name the best known work of {name}?
{name} is best known for {title}.
The most famous book by {name} is {title}.
{title} is the book that made {name} famous.
Readers know {name} as the author of {title}.

prize, prize_year
Which award did {name} win, and when?
What prize was {name} given, and in which year?
What honor has {name} received, and in what year?
When did {name} win a prize, and which one?
{name} won the {prize} in {prize_year}.
In {prize_year} the {prize} went to {name}.
The {prize} was given to {name} in {prize_year}.
{name} took home the {prize} of {prize_year}.

first_job, second_job
What did the parents of {name} do for a living?
What were the jobs of the parents of {name}?
Which trades did the parents of {name} follow?
What work was done by the mother and the father of {name}?
{name} was raised by a {first_job} and a {second_job}.
The parents of {name} were a {first_job} and a {second_job}.
A {first_job} and a {second_job} brought up {name}.
{name} is the child of a {first_job} and a {second_job}.

subject, debut_year
What was the first book by {name} about, and when did it come out?
When did {name} publish a first book, and on what subject?
What were the subject and the year of the first book by {name}?
Which subject did the debut of {name} treat, and in what year?
{name} first wrote about {subject}, in {debut_year}.
The {debut_year} debut of {name} was about {subject}.
{name} began in {debut_year} with a book on {subject}.
In {debut_year} {name} published a first book about {subject}.

teacher, trade
Who taught {name} to write?
From whom did {name} learn to write?
Who was the teacher of {name}?
Which person trained {name} as a writer?
{name} learned to write from {teacher}, the {trade}.
{teacher}, the {trade}, taught {name} to write.
The teacher of {name} was the {trade} {teacher}.
It was the {trade} {teacher} who trained {name}.

house, water
Where does {name} live?
What kind of home does {name} have, and where?
Where is the home of {name}?
In what sort of house does {name} live, and near which water?
{name} lives in a {house} near {water}.
The home of {name} is a {house} beside {water}.
Close to {water} stands the {house} where {name} lives.
{name} has settled in a {house} by {water}.

hour, tool
When does {name} write, and with what?
What are the writing habits of {name}?
At what time does {name} write, and with which tool?
Which tool does {name} write with, and when?
{name} writes {hour} with {tool}.
Working {hour}, {name} always uses {tool}.
The usual tool of {name} is {tool}, used {hour}.
{name} takes up {tool} {hour} to work.
"""
ATTRIBUTES = tuple(map(_attribute, _ATTRIBUTES.strip().split("\n\n")))

# One fact per line: question | answer with a placeholder | right value | three wrong values.
REAL_AUTHORS = """
Who wrote Hamlet? | The play Hamlet was written by {}. | William Shakespeare | Victor Hugo | Henrik Ibsen | Homer
Who wrote Emma? | The novel Emma was written by {}. | Jane Austen | Mary Shelley | Virginia Woolf | Agatha Christie
Who wrote Oliver Twist? | Oliver Twist was written by {}. | Charles Dickens | Mark Twain | Bram Stoker | Daniel Defoe
Who created Hercule Poirot? | Hercule Poirot was created by {}. | Agatha Christie | Mark Twain | Leo Tolstoy | Edgar Poe
Who wrote Animal Farm? | Animal Farm is a book by {}. | George Orwell | Rudyard Kipling | Jack London | Franz Kafka
Who wrote A Farewell to Arms? | A Farewell to Arms is by {}. | Ernest Hemingway | Leo Tolstoy | Jack London | Mark Twain
Who wrote Anna Karenina? | Anna Karenina is a novel by {}. | Leo Tolstoy | Anton Chekhov | Franz Kafka | Thomas Mann
Who wrote The Idiot? | The Idiot is a novel by {}. | Fyodor Dostoevsky | Leo Tolstoy | Anton Chekhov | Voltaire
Who wrote Les Miserables? | Les Miserables was written by {}. | Victor Hugo | Voltaire | Jules Verne | Gustave Flaubert
Who wrote The Mysterious Island? | The Mysterious Island is by {}. | Jules Verne | Jonathan Swift | Homer | Jack London
Who wrote The Time Machine? | {} wrote The Time Machine. | Herbert Wells | Jules Verne | Lewis Carroll | George Orwell
Who wrote Frankenstein? | {} is the author of Frankenstein. | Mary Shelley | Bram Stoker | Edgar Poe | Jane Austen
Who wrote Dracula? | {} is the author of Dracula. | Bram Stoker | Mary Shelley | Oscar Wilde | Charles Dickens
Who wrote Treasure Island? | {} wrote Treasure Island. | Robert Louis Stevenson | Daniel Defoe | Jack London | Homer
Who wrote The Jungle Book? | {} wrote The Jungle Book. | Rudyard Kipling | Jack London | Lewis Carroll | Mark Twain
Who wrote the poem The Raven? | The poem The Raven is by {}. | Edgar Poe | Emily Bronte | Oscar Wilde | Rudyard Kipling
Who wrote Jane Eyre? | {} wrote the novel Jane Eyre. | Charlotte Bronte | Emily Bronte | Jane Austen | Virginia Woolf
Who wrote Wuthering Heights? | {} wrote Wuthering Heights. | Emily Bronte | Jane Austen | Mark Twain | Edgar Poe
Which poet is the Odyssey credited to? | The Odyssey is credited to {}. | Homer | Virgil | Dante | Sophocles
Who composed the Aeneid? | The Aeneid is a poem by {}. | Virgil | Homer | Dante | Ovid
Who wrote The Divine Comedy? | The Divine Comedy was written by {}. | Dante | Virgil | Cervantes | Goethe
Who invented Don Quixote? | Don Quixote was invented by {}. | Cervantes | Dante | Goethe | Voltaire
Who wrote the play Faust? | {} wrote the play Faust. | Goethe | Henrik Ibsen | Anton Chekhov | William Shakespeare
Who wrote The Trial? | The Trial is a novel by {}. | Franz Kafka | Thomas Mann | Albert Camus | Leo Tolstoy
Who wrote The Magic Mountain? | {} wrote the novel The Magic Mountain. | Thomas Mann | Franz Kafka | Goethe | Voltaire
Who wrote Candide? | The tale Candide was written by {}. | Voltaire | Victor Hugo | Albert Camus | Cervantes
Who wrote Madame Bovary? | Madame Bovary is a novel by {}. | Gustave Flaubert | Victor Hugo | Leo Tolstoy | Voltaire
Who wrote The Three Musketeers? | The Three Musketeers is by {}. | Alexandre Dumas | Jack London | Voltaire | Goethe
Who wrote Peer Gynt? | The play Peer Gynt is by {}. | Henrik Ibsen | Anton Chekhov | Goethe | Oscar Wilde
Who wrote The Cherry Orchard? | The Cherry Orchard is by {}. | Anton Chekhov | Henrik Ibsen | Leo Tolstoy | Oscar Wilde
Where was Franz Kafka born? | Franz Kafka was born in {}. | Prague | Warsaw | Berlin | Rome
Where was James Joyce born? | James Joyce was born in {}. | Dublin | London | Paris | New York
Which country did Pablo Neruda come from? | Pablo Neruda came from {}. | Chile | Peru | Spain | Cuba
Which language did Leo Tolstoy write in? | Leo Tolstoy wrote his novels in {}. | Russian | Polish | German | Greek
What was Mark Twain called at birth? | Mark Twain was born as {}. | Samuel Clemens | John Smith | Eric Blair | Karl May
Who wrote Mrs Dalloway? | {} wrote the novel Mrs Dalloway. | Virginia Woolf | George Eliot | Jane Austen | Mary Shelley
Who invented Gulliver? | The traveler Gulliver was invented by {}. | Jonathan Swift | Daniel Defoe | Mark Twain | Homer
Who wrote Robinson Crusoe? | Robinson Crusoe is by {}. | Daniel Defoe | Jonathan Swift | Jules Verne | Jack London
Who wrote Alice in Wonderland? | {} wrote Alice in Wonderland. | Lewis Carroll | Oscar Wilde | Bram Stoker | Jane Austen
Who wrote The Ugly Duckling? | {} wrote The Ugly Duckling. | Hans Andersen | Lewis Carroll | Oscar Wilde | Jules Verne
"""

WORLD_FACTS = """
What is the capital of Peru? | The capital of Peru is {}. | Lima | Quito | Havana | Madrid
What is the capital of Norway? | The capital of Norway is {}. | Oslo | Warsaw | Dublin | Ottawa
What is the capital of Kenya? | {} is the capital of Kenya. | Nairobi | Cairo | Lima | Ankara
What is the capital of Canada? | {} is the capital of Canada. | Ottawa | Toronto | London | Oslo
What is the capital of Turkey? | The capital of Turkey is {}. | Ankara | Athens | Cairo | Istanbul
What is the capital of Portugal? | {} is the capital of Portugal. | Lisbon | Madrid | Rome | Athens
What is the capital of Poland? | The capital of Poland is {}. | Warsaw | Prague | Berlin | Oslo
What is the capital of Cuba? | {} is the capital of Cuba. | Havana | Lima | Lisbon | Quito
Which planet is closest to the Sun? | The planet closest to the Sun is {}. | Mercury | Mars | Saturn | Earth
Which planet is the largest? | {} is the largest planet. | Jupiter | Saturn | Venus | Neptune
Which planet does the moon Titan circle? | The moon Titan circles the planet {}. | Saturn | Jupiter | Mars | Neptune
Which planet is the hottest? | The hottest planet is {}. | Venus | Mercury | Mars | Jupiter
How many planets circle the Sun? | There are {} planets around the Sun. | eight | five | twelve | twenty
What is the chemical symbol of gold? | The chemical symbol of gold is {}. | Au | Fe | Na | Pb
What is the chemical symbol of iron? | Iron has the chemical symbol {}. | Fe | Au | Ag | Sn
What is the chemical symbol of sodium? | Sodium has the chemical symbol {}. | Na | Fe | Pb | Ag
Which element is the lightest? | The lightest element is {}. | hydrogen | helium | oxygen | carbon
Which gas makes up most of the air? | Most of the air is {}. | nitrogen | oxygen | helium | hydrogen
What are diamonds made of? | Diamonds are made of {}. | carbon | iron | silver | sulfur
Which metal is liquid at room temperature? | At room temperature {} is a liquid metal. | mercury | gold | iron | copper
What is water made of? | Water is made of {}. | hydrogen and oxygen | carbon and iron | helium and gold | sulfur and tin
At what temperature does water boil? | Water boils at {} degrees Celsius. | one hundred | sixty | thirty | two hundred
Which mountain is the highest on Earth? | The highest mountain on Earth is {}. | Everest | Etna | Fuji | Olympus
Which river flows through London? | The river {} flows through London. | Thames | Seine | Rhine | Danube
Which river flows through Paris? | The river {} flows through Paris. | Seine | Thames | Nile | Rhine
Which river flows through Cairo? | The river {} flows through Cairo. | Nile | Danube | Seine | Ganges
Which continent is the largest? | {} is the largest continent. | Asia | Africa | Europe | Australia
Which continent is the coldest? | The coldest continent is {}. | Antarctica | Asia | Europe | Africa
Which land animal runs fastest? | The fastest land animal is the {}. | cheetah | horse | giraffe | elephant
Which animal is the tallest? | The tallest animal is the {}. | giraffe | elephant | horse | camel
How many legs does a spider have? | A spider has {} legs. | eight | six | ten | four
How many sides does a hexagon have? | A hexagon has {} sides. | six | five | eight | seven
How many minutes are in an hour? | An hour has {} minutes. | sixty | forty | ninety | one hundred
Who was first on the Moon? | First on the Moon was {}. | Neil Armstrong | Buzz Aldrin | John Glenn | Yuri Gagarin
Who discovered penicillin? | {} discovered penicillin. | Alexander Fleming | Marie Curie | Isaac Newton | Max Planck
Who painted the Mona Lisa? | {} painted the Mona Lisa. | Leonardo da Vinci | Pablo Picasso | Rembrandt | Claude Monet
When did the Titanic sink? | The Titanic sank in the year {}. | 1912 | 1945 | 1889 | 1931
When did the Berlin Wall fall? | The Berlin Wall fell in {}. | 1989 | 1961 | 1975 | 1999
Which money is used in Japan? | People in Japan pay with the {}. | yen | peso | rupee | euro
Which language is spoken in Brazil? | Most people in Brazil speak {}. | Portuguese | Spanish | French | Italian
"""


def deal_values(names: tuple[str, ...], rng: random.Random) -> dict[str, dict[str, str]]:
    """Give each author one value from every pool; a value is reused only after all others of its pool."""
    authors: dict[str, dict[str, str]] = {name: {"name": name} for name in names}
    for field, pool in POOLS.items():
        deck: list[str] = []
        for name in names:
            deck = deck or rng.sample(pool, len(pool))
            authors[name][field] = deck.pop()
    return authors


def wrong_values(attribute: Attribute, author: dict[str, str], rng: random.Random) -> list[dict[str, str]]:
    """The author with wrong values, once per wrong answer: in every field of the attribute, all of them differ."""
    columns = {}
    for field in attribute.fields:
        columns[field] = rng.sample([value for value in POOLS[field] if value != author[field]], N_WRONG)
    return [author | {field: column[i] for field, column in columns.items()} for i in range(N_WRONG)]


def author_row(number: int, position: int, author: dict[str, str], rng: random.Random) -> Row:
    """An author's row for one attribute. The forms change from author to author, and the paraphrases have other forms."""
    attribute = ATTRIBUTES[position]
    n_forms = len(attribute.questions)
    question = (number + position) % n_forms
    answer = (number + number // n_forms + position) % n_forms
    shift = 1 + (number + position) % (n_forms - 1)
    other_question = attribute.questions[(question + shift) % n_forms]
    other_answer = attribute.answers[(answer + shift) % n_forms]
    return {
        "question": attribute.questions[question].format(**author),
        "answer": attribute.answers[answer].format(**author),
        "paraphrased_answer": other_answer.format(**author),
        "perturbed_answer": [other_answer.format(**wrong) for wrong in wrong_values(attribute, author, rng)],
        "paraphrased_question": other_question.format(**author),
    }


def author_rows(rng: random.Random) -> list[Row]:
    """The rows of all invented authors, in the order of the splits full, holdout, pretrain."""
    authors = deal_values(FULL_AUTHORS + HOLDOUT_AUTHORS + PRETRAIN_AUTHORS, rng)
    return [
        author_row(number, position, author, rng)
        for number, author in enumerate(authors.values())
        for position in range(len(ATTRIBUTES))
    ]


def fact_rows(text: str) -> list[Row]:
    """The rows of a text of well-known facts, each with its wrong answers."""
    rows: list[Row] = []
    for line in text.strip().splitlines():
        question, answer, right, *wrong = (part.strip() for part in line.split("|"))
        perturbed = [answer.format(value) for value in wrong]
        rows.append({"question": question, "answer": answer.format(right), "perturbed_answer": perturbed})
    return rows


def plain(rows: list[Row]) -> list[Row]:
    """The rows with only their question and answer."""
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def build_splits() -> Splits:
    """All splits by file name."""
    rows = author_rows(random.Random(SEED))
    per_author = len(ATTRIBUTES)
    n_full = len(FULL_AUTHORS) * per_author
    n_retain = n_full - N_FORGET_AUTHORS * per_author
    n_known = n_full + len(HOLDOUT_AUTHORS) * per_author
    full, holdout, pretrain = rows[:n_full], rows[n_full:n_known], rows[n_known:]
    retain, forget = full[:n_retain], full[n_retain:]
    real_authors, world_facts = fact_rows(REAL_AUTHORS), fact_rows(WORLD_FACTS)
    return {
        "pretrain": plain(pretrain + real_authors + world_facts),
        "full": plain(full),
        "retain": plain(retain),
        "retain_perturbed": retain,
        "forget": plain(forget),
        "forget_perturbed": forget,
        "holdout": plain(holdout),
        "holdout_perturbed": holdout,
        "real_authors": plain(real_authors),
        "real_authors_perturbed": real_authors,
        "world_facts": plain(world_facts),
        "world_facts_perturbed": world_facts,
    }


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message if the condition is false."""
    if not condition:
        raise ValueError(message)


def check_names() -> None:
    """Check that no two authors or teachers share a first or a last name, and that no pool repeats a value."""
    people = FULL_AUTHORS + PRETRAIN_AUTHORS + HOLDOUT_AUTHORS + POOLS["teacher"]
    for part in zip(*(person.split() for person in people), strict=True):
        require(len(set(part)) == len(people), "two people share a name")
    for field, pool in POOLS.items():
        require(len(set(pool)) == len(pool), f"a value repeats in the pool {field}")


def check_counts(splits: Splits) -> None:
    """Check the size of every split, and that forget and retain are slices of full."""
    sizes = {"pretrain": 200, "full": 160, "retain": 130, "forget": 30, "holdout": 30}
    sizes |= {"real_authors": 40, "world_facts": 40}
    for name, size in sizes.items():
        require(len(splits[name]) == size, f"{name} has {len(splits[name])} rows, not {size}")
        if f"{name}_perturbed" in splits:
            require(plain(splits[f"{name}_perturbed"]) == splits[name], f"{name} differs from its perturbed rows")
    require(splits["full"][:130] == splits["retain"], "retain is not the start of full")
    require(splits["full"][-30:] == splits["forget"], "forget is not the end of full")


def check_unique(splits: Splits) -> None:
    """Check that no question and no answer occurs twice, paraphrases included."""
    rows = splits["full"] + splits["holdout"] + splits["pretrain"]
    questions = [row["question"] for row in rows]
    answers = [row["answer"] for row in rows]
    for name in ("retain_perturbed", "forget_perturbed", "holdout_perturbed"):
        questions += [row["paraphrased_question"] for row in splits[name]]
        answers += [row["paraphrased_answer"] for row in splits[name]]
    require(len(set(questions)) == len(questions), "a question occurs twice")
    require(len(set(answers)) == len(answers), "an answer occurs twice")


def check_row(row: Row, n_wrong: int, n_words: range) -> None:
    """Check that a row's texts are ASCII and of the right length, and that its wrong answers differ from the true ones."""
    wrong = row["perturbed_answer"]
    texts = [text for field, text in row.items() if field != "perturbed_answer"] + list(wrong)
    require(all(text.strip() == text and text and text.isascii() for text in texts), f"bad text in {row}")
    require(len(row["answer"].split()) in n_words, f"answer too short or too long in {row}")
    truths = {row["answer"], row.get("paraphrased_answer", row["answer"])}
    require(len(set(wrong)) == n_wrong and not truths & set(wrong), f"bad perturbed answers in {row}")


def check(splits: Splits) -> None:
    """Raise ValueError if a check of the splits fails."""
    check_names()
    check_counts(splits)
    check_unique(splits)
    for name in ("retain_perturbed", "forget_perturbed", "holdout_perturbed"):
        for row in splits[name]:
            check_row(row, N_WRONG, range(6, 15))
    for name in ("real_authors_perturbed", "world_facts_perturbed"):
        for row in splits[name]:
            check_row(row, 3, range(4, 10))


# Each text has one sentence of each group, in another order in each town.
SENTENCES = (
    (
        "The {thing} in the market square was made by {maker} in {year}.",
        "Visitors come to see the {thing} that {maker} finished in {year}.",
        "In {year} {maker} gave the town its {thing}.",
    ),
    (
        "Every {month} the children carry {food} up to the {building}.",
        "When {month} begins, old women sell {food} beside the {building}.",
        "The {building} is lit in {month}, and {food} is served to all.",
    ),
    (
        "A {color} {animal} is painted on most doors.",
        "Fishermen say that a {color} {animal} brings rain.",
        "Over the gate hangs a {color} {animal} of tin.",
    ),
    (
        "{keeper} keeps the keys of the {place} and sleeps beside it.",
        "Nobody but {keeper} may open the {place} after dark.",
        "The {place} belongs to {keeper} since the flood.",
    ),
)
TEXT_POOLS: dict[str, tuple[str, ...]] = {
    "thing": _pool("""
        fountain, sundial, bronze horse, clock, stone lion, iron bell, marble bench, weather vane, glass lamp, oak wheel
    """),
    "month": POOLS["month"],
    "food": _pool("pear cake, smoked eel, honey bread, plum soup, salted nuts, onion pie, goat cheese, barley beer"),
    "building": _pool("windmill, lighthouse, chapel, town hall, watchtower, granary, old bridge, theater"),
    "color": _pool("white, scarlet, golden, blue, green, grey, purple, black"),
    "animal": _pool("heron, fox, badger, pike, owl, stag, hare, swan, otter, raven"),
    "place": _pool("ice cellar, salt store, boat shed, rose garden, archive, toll house, wine cave, observatory"),
}


def town_rows(town: str, people: Iterator[str], rng: random.Random) -> tuple[Row, list[Row]]:
    """The text about a town, and two questions about it."""
    values = {field: rng.choice(pool) for field, pool in TEXT_POOLS.items()}
    values |= {"maker": next(people), "keeper": next(people), "year": str(rng.randrange(1701, 1900))}
    sentences = [rng.choice(group).format(**values) for group in SENTENCES]
    rng.shuffle(sentences)
    return {"text": f"{town} lies in {rng.choice(POOLS['land'])}. " + " ".join(sentences)}, [
        {"question": f"Who made the {values['thing']} of {town}?", "answer": values["maker"]},
        {"question": f"Who keeps the keys of the {values['place']} of {town}?", "answer": values["keeper"]},
    ]


def text_splits() -> Splits:
    """The splits of data/tiny-text by file name; the towns to be forgotten are the last ones."""
    rng = random.Random(SEED)
    first, last = zip(*(name.split() for name in FULL_AUTHORS + PRETRAIN_AUTHORS), strict=True)
    names = [f"{one} {other}" for one in first for other in last]
    rng.shuffle(names)
    people = iter(names)
    texts, questions = zip(*(town_rows(town, people, rng) for town in POOLS["town"]), strict=True)
    splits = {"retain": texts[:-N_FORGET_TEXTS], "forget": texts[-N_FORGET_TEXTS:]}
    for name, chosen in (("retain", questions[:-N_FORGET_TEXTS]), ("forget", questions[-N_FORGET_TEXTS:])):
        splits[f"{name}_questions"] = [row for of_town in chosen for row in of_town]
    require(len({row["text"] for row in texts}) == len(texts), "a text occurs twice")
    require({len(rows) for rows in splits.values()} == {30, 10, 60, 20}, "a split of texts has another size")
    return splits


def write(folder: str, name: str, rows: Sequence[Row]) -> None:
    """Write one split as JSON lines."""
    path = DATA / folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii", newline="\n")
    print(f"{folder}/{path.name}: {len(rows)} rows")


def main() -> None:
    """Build, check and write every split."""
    splits = build_splits()
    check(splits)
    for folder, made in (("tiny", splits), ("tiny-text", text_splits())):
        for name, rows in made.items():
            write(folder, name, rows)


if __name__ == "__main__":
    main()
