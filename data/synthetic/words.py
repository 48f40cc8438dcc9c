"""Words, numbers and texts that questions are made of, which every machine has: nothing is downloaded.

The lists are fixed, so that a question is the same with every version of Python. (The help topics of pydoc, which are
the natural text where no other is given, change with the version.)
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from itertools import chain

import numpy as np

from ..sources import SourceError, SourceSpec, read


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _listed(
    """able ample amber ancient azure blunt bold brave brief bright brisk broad calm candid careful cheerful civic
    clean clear clever coastal cobalt cold common copper coral crimson crisp curious daily damp daring dark deep
    distant double dry dusty eager early earnest easy elder empty even exact fair faint famous fancy festive
    fierce final firm flat fluent fond formal frank fresh frosty full gentle giant glad global golden grand
    grateful gray great green grim handy happy harsh hasty hazel heavy hidden hollow honest humble icy ideal
    idle inner ivory jolly keen kind large late lavish lean level light lively local lofty lone long loud loyal
    lucid lucky lunar major mellow merry mild minor modern modest mossy muted narrow neat nimble noble north
    novel odd olive open outer pale patient plain pleasant polite prime prompt proud pure quaint quick quiet
    rapid rare raw ready real regal rich rigid ripe robust rosy rough round royal rural rustic safe scarlet
    secret serene sharp shiny short shy silent silver simple sleek slow small smooth snowy sober soft solar
    solid south spare spicy steady steep stern still stout strict strong subtle sunny sure sweet swift tall tame
    tender thick thin tidy timely tiny total tough tranquil true upper urban useful vague vast velvet violet
    vital vivid warm wary western whole wide wild windy winter wise witty wooden young zesty"""
)
NOUNS = _listed(
    """acorn actor album alley anchor angle ankle apple apron arch arrow atlas attic autumn badge bakery balcony
    bamboo banjo barn basil basin basket beach beacon bench berry blanket blossom border bottle branch bread
    breeze brick bridge broom brush bucket button cabin cable cactus camera canal candle canoe canvas canyon
    captain carpet castle cedar cellar chalk chapel cherry chimney circle cliff clock cloud clover coat coffee
    collar comet compass copper corner cotton cousin cradle crane crater cricket crystal curtain dairy dancer
    desert diary dinner dock dolphin donkey door dragon drawer drum eagle easel echo elbow ember engine envelope
    estuary fabric falcon feather fence ferry fiddle field finger flame flute forest fork fossil fountain fox
    frame garden garlic gate ginger glacier glove goat grain granite grape guitar hammer harbor harvest hat
    hazel heron hill honey horizon horn hotel house igloo inlet island jacket jar jewel journal jungle kettle
    key kitchen kite ladder lagoon lake lamp lantern leaf lemon letter library lily linen lion lizard lobster
    locket lodge magnet mango mantle map maple marble market meadow melody mint mirror mountain museum napkin
    needle nest notebook oak oasis ocean olive onion orchard orchid otter oven oyster paddle palace panther
    paper parcel path pebble pencil pepper piano picnic pigeon pillow pine planet plate plaza plum pocket pond
    poplar porch prairie puzzle quarry quilt rabbit radio raft railway rain raven reef ribbon ridge river road
    robin rocket roof rope rose saddle sailor salt sand scarf school shadow shell shelf ship shoe shore signal
    singer sister sketch sleeve snail soap song sparrow spoon spring square stable stair star station statue
    stone storm stove stream street sugar summit swan table tailor teapot temple tent thistle thread thunder
    ticket tiger timber torch tower town train trout trumpet tulip tunnel turtle umbrella valley vase vessel
    village vineyard violin voyage wagon wall walnut water whale wheat wheel willow window wing winter wolf wool
    yacht yard zebra"""
)
VERBS = _listed(
    """accept add admire adopt agree allow answer appear argue arrange arrive ask assist attend avoid bake balance
    become begin believe belong borrow bounce breathe bring build buy call carry catch celebrate change chase
    choose climb collect combine compare consider cook count cover create cross decide deliver describe design
    dig discover divide draw dream drink earn eat enjoy enter escape examine expand explain explore fetch find
    finish float fly fold follow forget gather give glide grow guess guide hear help hide hold hope hurry
    imagine improve include invite join jump keep kneel knit know laugh lead learn leave lend lift listen look
    march measure meet mend mix move nod notice obey observe offer order paint pass pause plan plant play polish
    pour practice praise prepare press promise protect pull push race reach read receive remember remove repair
    repeat reply rest return ride rise roll sail save search seek select send serve settle share shine shout
    sing sit sleep slide smile solve sort speak spend spin stand start stay stir stretch study support swim
    swing talk taste teach tell thank think throw tie touch trace trade travel trust try turn understand unite
    visit wait wake walk wander wash watch wave wear weave welcome whisper win wish wonder work wrap write yield"""
)
CITIES = _listed(
    """Accra Algiers Amman Ankara Athens Baku Bamako Bangkok Belgrade Berlin Bogota Brussels Bucharest Budapest
    Cairo Canberra Caracas Chicago Colombo Dakar Damascus Dhaka Doha Dublin Geneva Hanoi Harare Havana Helsinki
    Istanbul Jakarta Kabul Kampala Kigali Kingston Lagos Lima Lisbon London Luanda Lusaka Madrid Manila Maputo
    Melbourne Minsk Montreal Moscow Mumbai Nairobi Nicosia Osaka Oslo Ottawa Paris Prague Quito Riga Riyadh Rome
    Santiago Seoul Sofia Stockholm Sydney Tallinn Tbilisi Tehran Tirana Tokyo Toronto Tripoli Tunis Vienna
    Vilnius Warsaw Zagreb Zurich"""
)

PLAIN_WORDS = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))
COMPOUNDS = tuple(f"{adjective}-{noun}" for adjective in sorted(set(ADJECTIVES)) for noun in sorted(set(NOUNS)))

_SENTENCE_ENDS = (".", "!", "?", '."', '!"', '?"', ".)", ".'")


class NaturalText:
    """Words of natural texts, one after the other; where they end they begin again.

    Raises ValueError for texts without words.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.words = tuple(chain.from_iterable(text.split() for text in texts))
        if not self.words:
            raise ValueError("the texts that fill a prompt hold no words: give at least one text")
        # Where sentences begin: behind a word that ends one.
        self.beginnings = tuple(
            place for place in range(len(self.words)) if self.words[place - 1].endswith(_SENTENCE_ENDS)
        ) or (0,)

    def word(self, place: int) -> str:
        return self.words[place % len(self.words)]


def library_texts() -> tuple[str, ...]:
    """What every machine has of prose: pydoc's help topics, or where a distribution leaves them out, the sources of the
    library. Both change with the version of Python."""
    documents = list(read(SourceSpec()))
    topics = tuple(document.text for document in documents if document.id.startswith("topics/"))
    if topics:
        return topics
    if not documents:
        raise SourceError("this Python has neither help topics nor sources of its library: give texts to fill with")
    return tuple(document.text for document in documents)


def cut_at_sentence(words: list[str], place: int) -> int:
    """The last place up to `place` where a sentence begins."""
    if place >= len(words):
        return len(words)
    while place > 0 and not words[place - 1].endswith(_SENTENCE_ENDS):
        place -= 1
    return place


def number(rng: np.random.Generator) -> str:
    """Seven digits."""
    return str(rng.integers(10**6, 10**7))


def random_uuid(rng: np.random.Generator) -> str:
    """A random UUID (version 4)."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def compound(rng: np.random.Generator) -> str:
    """An adjective and a noun, with a hyphen."""
    return COMPOUNDS[int(rng.integers(len(COMPOUNDS)))]


def distinct(draw: Callable[[np.random.Generator], str], n: int, rng: np.random.Generator) -> list[str]:
    """n different ones, in the order in which they were drawn."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[draw(rng)] = None
    return list(found)
