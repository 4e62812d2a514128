"""The words that the demonstration model is trained on.

Rules:

- Standard library only.
- The order of a tuple is part of the recipe: a seed picks by position.
- Names, cities and units never share a word, so that an answer that mixes them up is seen to be wrong.
"""

import random
from collections.abc import Sequence
from typing import Final

NAMES: Final = (
    "Ada", "Adam", "Agnes", "Alan", "Alice", "Amir", "Amy", "Anna", "Anton", "Asha", "Astrid", "Ben", "Boris", "Bruno",
    "Carla", "Carlos", "Chen", "Clara", "Dana", "Daniel", "David", "Diego", "Dora", "Edgar", "Elena", "Eli", "Emma",
    "Erik", "Esther", "Eva", "Farah", "Felix", "Fiona", "Frank", "Freya", "Grace", "Greta", "Hana", "Hannah", "Hans",
    "Hassan", "Helen", "Henry", "Hugo", "Ida", "Igor", "Ines", "Ingrid", "Ivan", "Jack", "James", "Jane", "Javier",
    "John", "Jonas", "Julia", "Karim", "Kate", "Kira", "Lars", "Laura", "Layla", "Leo", "Lena", "Liam", "Linda", "Lisa",
    "Lucas", "Lucy", "Lukas", "Maja", "Mara", "Marco", "Maria", "Mark", "Marta", "Max", "Maya", "Mia", "Mina", "Mira",
    "Mona", "Nadia", "Nia", "Nina", "Noah", "Nora", "Olga", "Oliver", "Omar", "Oscar", "Otto", "Paul", "Pavel", "Peter",
    "Petra", "Priya", "Rachel", "Rafael", "Ravi", "Rita", "Robert", "Rosa", "Ruth", "Sam", "Sara", "Sarah", "Selma",
    "Simon", "Sofia", "Stefan", "Susan", "Tara", "Theo", "Thomas", "Tim", "Tina", "Tom", "Uma", "Vera", "Viktor",
    "Walter", "Yara", "Yusuf", "Zoe",
)  # fmt: skip

CAPITALS: Final = {
    "Austria": "Vienna", "Belgium": "Brussels", "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago",
    "China": "Beijing", "Croatia": "Zagreb", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "England": "London", "Estonia": "Tallinn", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin",
    "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "Delhi",
    "Iran": "Tehran", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi", "Latvia": "Riga",
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Russia": "Moscow",
    "Spain": "Madrid", "Sweden": "Stockholm", "Switzerland": "Bern", "Thailand": "Bangkok", "Turkey": "Ankara",
    "Ukraine": "Kyiv",
}  # fmt: skip

CITIES: Final = (
    *(city for city in CAPITALS.values() if city != "Sofia"),
    "Amsterdam", "Barcelona", "Basel", "Boston", "Bremen", "Chicago", "Cologne", "Dallas", "Dresden", "Florence",
    "Geneva", "Genoa", "Glasgow", "Graz", "Hamburg", "Istanbul", "Karachi", "Krakow", "Lagos", "Leeds", "Lyon",
    "Malaga", "Manila", "Miami", "Milan", "Montreal", "Mumbai", "Munich", "Naples", "Osaka", "Porto", "Prague",
    "Seattle", "Seoul", "Seville", "Shanghai", "Singapore", "Split", "Sydney", "Toronto", "Turin", "Utrecht",
    "Valencia", "Venice", "Verona", "York", "Zurich",
)  # fmt: skip

UNITS: Final = (
    "Rook", "Heron", "Lark", "Falcon", "Plover", "Curlew", "Gannet", "Tern", "Petrel", "Merlin", "Linnet",
    "Wren", "Robin", "Dove", "Martin", "Lapwing", "Dunlin", "Coot", "Bittern", "Egret", "Harrier", "Finch",
    "Goose", "Nuthatch", "Oriole", "Pipit", "Redwing", "Siskin", "Teal", "Swan",
    "Avocet", "Brambling", "Bullfinch", "Bunting", "Buzzard", "Chough", "Cormorant", "Crake", "Crane", "Crossbill",
    "Cuckoo", "Dipper", "Dotterel", "Eider", "Fulmar", "Gadwall", "Garganey", "Godwit", "Goldcrest", "Goshawk",
    "Grebe", "Guillemot", "Hawfinch", "Hobby", "Hoopoe", "Jackdaw", "Jay", "Kestrel", "Kingfisher", "Knot",
    "Magpie", "Mallard", "Osprey",
)  # fmt: skip

UNIT_KINDS: Final = ("pump", "fan", "tank", "valve", "motor", "filter")

# What a unit can be reported as, and what the handbook says to do about it.
ACTIONS: Final = {
    "steady": "keep watching",
    "hot": "slow it down",
    "cold": "warm it up",
    "leaking": "close it",
    "silent": "check the sensor",
    "noisy": "call the crew",
}

COLOURS: Final = (
    "red", "blue", "green", "yellow", "black", "white", "purple", "orange", "pink", "brown", "grey", "gold",
)  # fmt: skip

DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

THINGS: Final = (
    "apples", "boats", "books", "bread", "bridges", "candles", "carpets", "castles", "cats", "chairs", "cheese",
    "clouds", "coffee", "dogs", "flowers", "gardens", "horses", "islands", "kites", "ladders", "lamps", "maps",
    "mountains", "music", "otters", "paper", "pencils", "rivers", "roses", "ships", "shoes", "snow", "soup", "stars",
    "stones", "storms", "sugar", "tables", "tea", "towers", "trains", "trees", "water", "whales", "windows", "wood",
)  # fmt: skip

LISTED: Final = (*NAMES, *CAPITALS, *CITIES, *UNITS, *UNIT_KINDS, *COLOURS, *DAYS, *THINGS)
"""Every word that an answer may have to copy."""

_ONSETS: Final = (
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m", "n", "p", "pr", "qu", "r",
    "s", "sh", "sk", "st", "t", "th", "tr", "v", "w", "y", "z",
)  # fmt: skip
_INVENTED: Final = 0.08
_VOWELS: Final = ("a", "e", "i", "o", "u", "ai", "ea", "ee", "ia", "oo", "ou", "y")
_ENDINGS: Final = ("", "", "n", "r", "s", "l", "m", "t", "x", "ck", "nd", "rt", "th", "na", "sen", "ton", "ne", "lle")


def listed_word(rng: random.Random, words: Sequence[str], *, invents: bool) -> str:
    """One of `words`; or now and then, if `invents`, a word that is in no list."""
    return invented_word(rng) if invents and rng.random() < _INVENTED else rng.choice(words)


def invented_word(rng: random.Random) -> str:
    """A capitalised word of two or three syllables that is in no list: it teaches copying instead of remembering."""
    syllables = rng.choice((1, 2, 2, 2, 3))
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_ENDINGS)
    return word.capitalize()
