"""Invents documents full of facts, and questions on them.

Everything the demonstration model reads comes from this file: invented people and towns, two
dozen kinds of fact, several phrasings of each, filler, headings, lists. No outside text is used.

A training sequence, and so the format the model knows, is

    {document}

    Q: {question}
    A: {answer}<eos>
    Q: {question}
    A: {answer}<eos>
    ...

A token is a byte of UTF-8 plus 3; 0 is padding, 1 is unused, 2 is <eos>.
"""

import random
import re

import numpy as np

PAD, EOS, BYTE_OFFSET = 0, 2, 3
NOT_STATED = "not stated."

# What each token of a training sequence is; train.py weighs the loss by it.
IS_TEXT, IS_ANSWER, IS_EOS, IS_FIRST = 1, 2, 3, 4  # IS_FIRST: the answer's first byte


def encode(text):
    return [byte + BYTE_OFFSET for byte in text.encode()]


# ---------------------------------------------------------------------------------------------
# Names

ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh sk st t th tr v w y z".split()
VOWELS = "a a a a a e e e e e i i i i o o o o u u u y ai ea ie io".split()
CODAS = "b ck d f g l l ll m n n n nd nn p r r rn s s sk ss st t th x".split() + [""] * 12
ACCENTS = str.maketrans("aeiou", "áéíöü")
FIRST_NAMES = """Ada Agnes Alma Amos Anders Anna Arlo Astrid Aubrey Beatrix Ben Bettina Bram Carla
Caspar Cecily Clara Conrad Cora Dagmar Daria David Della Dmitri Dora Edith Edmund Elena Elias Ella
Emil Enid Erik Esther Eva Ezra Felix Flora Frances Freda George Gerda Gideon Greta Hanna Harold Hattie
Hazel Helga Henry Hilda Hugo Ida Igor Ines Ingrid Iris Isaac Ivan Jack Jasper Joan Jonas Judith Julia
Karl Katrin Kofi Lara Laszlo Lena Leo Lilian Linus Lucas Lydia Magda Marcus Maria Martin Maud Max Mei
Mikael Milo Mina Miriam Moira Nadia Ned Nell Nina Noah Nora Olaf Olga Oscar Otto Pauline Pearl Petra
Philip Quentin Rafael Ravi Rhoda Robert Rosa Rufus Ruth Samuel Sara Selma Silas Simon Sofia Stefan
Susan Tamar Theo Thomas Tilda Tobias Ulla Ursula Vera Victor Viola Walter Wanda Wilma Xavier Yara
Yusuf Zelda Zora""".split()
TITLES = "Captain Doctor Dr. Mr. Mrs. Ms. Miss Professor Sister Brother Old Aunt Uncle Judge Sergeant Lady".split()
TOWN_ENDINGS = "ton ford mere wick ham haven burg dale stead port field bridge mouth ley by wold cliff".split()
TOWN_PREFIXES = "Port Upper Lower East West New Old Great Little Fort Saint Mount North South".split()


class Names:
    """Draws names; no distinctive word occurs in two names of one document."""

    def __init__(self, rng):
        self.rng = rng
        self.used = set()

    def word(self, syllables):
        rng = self.rng
        word = ""
        for i in range(syllables):
            coda = rng.choice(CODAS) if i == syllables - 1 or rng.random() < 0.4 else ""
            word += rng.choice(ONSETS) + rng.choice(VOWELS) + coda
        if rng.random() < 0.02:
            word = word.translate(ACCENTS)
        return word.capitalize()

    def fresh(self, draw):
        while True:
            word = draw()
            if len(word) > 2 and word not in self.used:
                self.used.add(word)
                return word

    def first(self):
        rng = self.rng
        return self.fresh(lambda: rng.choice(FIRST_NAMES) if rng.random() < 0.5 else self.word(rng.choice((1, 2, 2, 2, 3))))

    def person(self):
        """(full name, short name): the short one is the part that is unique."""
        rng = self.rng
        style = rng.random()
        first = self.first()
        if style < 0.45:
            return first, first
        if style < 0.85:
            return f"{first} {self.fresh(lambda: self.word(rng.choice((1, 2, 2, 3))))}", first
        return f"{rng.choice(TITLES)} {first}", first

    def town(self):
        rng = self.rng
        stem = self.fresh(lambda: self.word(rng.choice((1, 1, 2))) + (rng.choice(TOWN_ENDINGS) if rng.random() < 0.6 else ""))
        full = f"{rng.choice(TOWN_PREFIXES)} {stem}" if rng.random() < 0.2 else stem
        return full, full


# ---------------------------------------------------------------------------------------------
# Words for values and filler

TRADES = """accountant actor apothecary archer architect baker barber basket-maker beekeeper blacksmith
boatbuilder bookbinder bricklayer butcher candle-maker carpenter cartographer chemist clerk clockmaker cobbler
cook cooper dancer dentist diver doctor driver dyer electrician engineer farmer ferryman fisherman florist
gardener glassblower goldsmith grocer guide hatter innkeeper jeweller joiner journalist juggler keeper lawyer
librarian locksmith mason mechanic midwife miller miner musician nurse optician painter pharmacist pilot
plumber porter potter printer ranger roofer sailor sculptor shepherd singer smith soldier stonecutter surgeon
tailor tanner teacher thatcher translator typist undertaker upholsterer vet watchman weaver welder writer""".split()
COLOURS = """amber beige black blue bronze brown copper cream crimson cyan emerald gold green grey indigo ivory
lavender lilac magenta maroon mauve navy ochre olive orange peach pink plum purple red rose ruby rust salmon
scarlet silver tan teal turquoise umber violet white yellow""".split()
SHADES = ["dark", "pale", "light", "bright", "deep", "dusty"]
ANIMALS = """badger cat canary cow crow dog donkey duck ferret fox goat goose hamster hawk hedgehog hen horse
kitten lamb lizard magpie mule otter owl parrot pig pigeon pony rabbit raven sheep snake spaniel squirrel
terrier toad tortoise turtle""".split()
PET_NAMES = """Bandit Biscuit Button Clover Coco Comet Dusty Fern Fidget Flint Ginger Hobbit Juniper Lucky Marble
Misty Mopsy Nettle Nutmeg Patch Pebble Pepper Pickle Pip Rusty Shadow Smoky Socks Sorrel Spot Star Sunny Tansy
Teasel Thistle Tinker Toffee Truffle Whisper Widget""".split()
GOODS = """apples bells blankets books boots bottles bread bricks brooms buttons candles carpets cheese cider clocks
coal coats coffee copper cups eggs feathers figs fish flour flowers furs glass gloves grain hats hay herbs hides
honey ink iron jars kettles knives lace lamps leather lemons linen maps milk mirrors nails needles nuts oil olives
onions paint paper pears pepper plums pots rice rope saddles salt seeds shoes silk soap spices sugar tea tiles
timber tin tools toys turnips umbrellas vinegar wax wheat wine wool yarn""".split()
INSTRUMENTS = """accordion banjo bassoon bugle cello clarinet cornet drum fiddle flute guitar harmonica harp horn
lute lyre mandolin oboe organ piano piccolo recorder saxophone sitar tambourine trombone trumpet tuba viola violin
whistle zither""".split()
DISHES = """apple cake|barley soup|bean stew|beef pie|beetroot soup|black bread|blackberry tart|boiled eggs|buttered
toast|cabbage rolls|carrot cake|cheese dumplings|cherry pie|chicken broth|cod cakes|corn bread|crab salad|fish
stew|fried mushrooms|garlic noodles|ginger biscuits|grilled trout|honey cake|leek soup|lemon tart|lentil soup|
mutton stew|oat porridge|onion soup|pancakes|pea soup|pickled herring|plum pudding|potato cakes|pumpkin soup|rice
pudding|roast duck|rye bread|smoked eel|spiced lamb|spinach pie|stuffed peppers|tomato salad|walnut bread"""
DISHES = [re.sub(r"\s+", " ", dish).strip() for dish in DISHES.split("|")]
BOAT_WORDS = """Albatross Anchor Aurora Bittern Breeze Compass Cormorant Curlew Dawn Dolphin Drifter Ember Falcon
Fortune Gannet Gull Harvest Heron Hope Kestrel Lantern Lark Marigold Mermaid Osprey Patience Pearl Pelican Petrel
Plover Primrose Providence Puffin Rambler Sandpiper Seal Spray Swallow Swan Tempest Tern Venture Wanderer Wren""".split()
BOAT_ADJECTIVES = "Blue Bright Brave Early Golden Gentle Grey Happy Last Little Lonely Merry Morning Northern Old Proud Red Quiet Silver Swift White".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
LANGUAGES = """Arabic Basque Breton Catalan Czech Danish Dutch Estonian Finnish French Frisian Gaelic Georgian German
Greek Hindi Hungarian Icelandic Irish Italian Japanese Korean Latin Latvian Maltese Norwegian Persian Polish
Portuguese Romanian Russian Serbian Spanish Swahili Swedish Tamil Thai Turkish Urdu Welsh Yoruba Zulu""".split()

ADJECTIVES = """ancient bare bitter bleak bright broad broken busy calm cheap clean cold cracked crooked crowded
damp dark deep distant dry dull dusty empty faded faint fine flat foggy forgotten fresh frozen gentle grand heavy
high hollow idle large late lazy light long low mild muddy narrow neat new noisy old pale patient plain polished
poor proud quiet rough round rusty sharp silent slow small smooth soft solid steep still strange sudden tall thin
tidy tired warm wet wide wild wooden worn yellow young""".split()
NOUNS = """alley bakery bank barn basket bell bench boat bridge cart castle chapel church clock cloud corner
courtyard crowd desk door draper east-wind engine fair fence ferry field fire forest fountain garden gate hall
harbour harvest hedge hill inn island kitchen ladder lamp lane lantern library lighthouse map market meadow mill
mist moon mountain office orchard path pier playground pond post quarry queue railway rain river road roof rope
school sea ship shop shore signpost snow square stable station steps storm stove stream street table tavern thunder
tide tower town train tree tunnel valley village wagon wall warehouse well wheel wind window winter wood yard""".split()
PAST_VERBS = """appeared behind|came to rest by|could be seen from|creaked beside|drifted over|fell across|gave way
to|grew beside|hung above|hurried past|lay beneath|leaned against|looked out over|moved toward|passed|rattled
behind|reached|rose above|shone on|sank behind|settled on|stood near|stretched beyond|swung above|turned toward|
vanished behind|waited by|was hidden by|was moved to|was painted like|was repaired after|was sold with"""
PAST_VERBS = [re.sub(r"\s+", " ", verb).strip() for verb in PAST_VERBS.split("|")]
WHEN = """at dawn|before breakfast|in the evening|all afternoon|after the storm|that spring|for a while|as usual|
in those days|at the end of the week|without a sound|once more|during the fair|late in the year|year after year|
when the tide was low|on the way home|long before noon"""
WHEN = [re.sub(r"\s+", " ", phrase).strip() for phrase in WHEN.split("|")]
DOINGS = """walked along the quay|stopped to talk with a stranger|waited for the last train|read the newspaper twice|
forgot an umbrella again|went out to look at the snow|told a long story about the war|lost a button on the stairs|
helped to carry the benches|stayed indoors|wrote three letters|missed the meeting|laughed at the joke|bought
a ticket and then gave it away|asked for a second cup of tea|sat by the window|had nothing to add|mended the fence|
arrived late|left early|was seen near the old bridge|slept badly|spoke for an hour|heard the bells|crossed the square"""
DOINGS = [re.sub(r"\s+", " ", doing).strip() for doing in DOINGS.split("|")]
REMARKS = """Nobody could say why.|It was never explained.|The rest is well known.|There was little else to do.|
That is how the story is told.|Some doubt it.|The matter was soon forgotten.|No record of it survives.|
Things went on much as before.|Everyone agreed on that.|The details are set out below.|It made no difference in
the end.|So much for the weather.|Much has changed since then.|A few words on the others may be useful."""
REMARKS = [re.sub(r"\s+", " ", remark).strip() for remark in REMARKS.split("|")]
LEAD_INS = ["As everyone knows,", "In fact,", "According to the register,", "By all accounts,", "Meanwhile,",
            "At the time of writing,", "It is said that", "For the record,", "It turns out that", "Of course,",
            "As far as anyone can tell,", "Note that", "The clerk wrote that", "To this day,", "Everybody says that",
            "On top of that,", "We also learned that", "Again,", "However,", "As it happens,"]
TAILS = [", as the neighbours confirm", ", according to the records", ", so they say", ", and that is certain",
         ", as before", ", which surprised nobody", ", or so the papers show", ", as far as we know"]
SECTIONS = ["Notes", "Records", "People", "Background", "The register", "Interviews", "Who is who", "Further notes",
            "Summary", "From the diary", "Letters", "Appendix", "The town and its people", "Minutes of the meeting"]


# ---------------------------------------------------------------------------------------------
# Kinds of fact. {n} is the subject's name, {v} the value, {a} its article, {w} a second value.

def article(word):
    return "an" if word[0] in "aeiou" else "a"


class Kind:
    """One kind of fact.

    draw:      the value(s), given the document
    verbs:     predicates with the subject's name in front ("Mara" + "lives in Toln")
    sentences: whole sentences, without the full stop
    labels:    what a list calls it ("- Age: 44")
    asks:      questions answered by {v}; asks_w those answered by {w}
    aside:     set between commas after the name ("Mara, aged 44, ...")
    """

    def __init__(self, draw, verbs, sentences, labels, asks, asks_w=(), aside=None, item="{v}"):
        self.draw, self.verbs, self.sentences, self.labels = draw, verbs, sentences, labels
        self.asks = [(ask, "v") for ask in asks] + [(ask, "w") for ask in asks_w]
        self.aside, self.item = aside, item


def value(text, second=""):
    return {"v": text, "a": article(text.lower()), "w": second}


def one_of(words):
    return lambda doc: value(doc.rng.choice(words))


def number(low, high):
    return lambda doc: value(str(doc.rng.randint(low, high)))


def colour(doc):
    shade = doc.rng.choice(SHADES) + " " if doc.rng.random() < 0.3 else ""
    return value(shade + doc.rng.choice(COLOURS))


def pet(doc):
    animal = doc.rng.choice(ANIMALS)
    name = doc.rng.choice(PET_NAMES) if doc.rng.random() < 0.7 else doc.names.word(doc.rng.choice((1, 2)))
    return {"v": name, "a": article(animal), "w": animal}


def boat(doc):
    rng = doc.rng
    return value(rng.choice(BOAT_WORDS) if rng.random() < 0.5 else f"{rng.choice(BOAT_ADJECTIVES)} {rng.choice(BOAT_WORDS)}")


def badge(doc):
    rng = doc.rng
    letters = "".join(rng.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=rng.choice((1, 2))))
    return value(f"{letters}-{rng.randint(100, 9999)}")


def population(doc):
    people = doc.rng.randint(200, 99999)
    return value(f"{people:,}" if doc.rng.random() < 0.5 else str(people))


def somebody(doc):
    return value(doc.other_person())


def river(doc):
    return value(doc.names.word(doc.rng.choice((1, 2))))


PERSON_KINDS = {
    "home": Kind(
        lambda doc: value(doc.some_town()),
        ["lives in {v}", "has a house in {v}", "has lived in {v} for years", "settled in {v}", "resides in {v}",
         "makes a home in {v}", "is at home in {v}"],
        ["The home of {n} is in {v}", "{n}'s house stands in {v}", "The town where {n} lives is {v}", "The home town of {n} is {v}"],
        ["Home", "Lives in", "Town", "Home town"],
        ["Where does {n} live?", "In which town does {n} live?", "Where is {n}'s home?", "Which town does {n} live in?",
         "Where is the house of {n}?", "What is {n}'s home town?", "What town is the home of {n}?"],
        aside="of {v}"),
    "trade": Kind(
        one_of(TRADES),
        ["works as {a} {v}", "is {a} {v}", "earns a living as {a} {v}", "is employed as {a} {v}", "is {a} {v} by trade",
         "has worked for years as {a} {v}", "trained as {a} {v}"],
        ["The trade of {n} is that of {a} {v}", "By profession {n} is {a} {v}", "{n}'s occupation is {v}", "People know {n} as {a} {v}"],
        ["Trade", "Occupation", "Work", "Job", "Profession"],
        ["What is {n}'s trade?", "What does {n} do for a living?", "What work does {n} do?", "What is the occupation of {n}?",
         "What is {n}'s job?", "As what does {n} work?", "What is the profession of {n}?"],
        aside="{a} {v}"),
    "password": Kind(
        number(10000, 99999),
        ["uses the password {v}", "has the password {v}", "signs in with the password {v}", "chose the password {v}",
         "was given the password {v}"],
        ["The password of {n} is {v}", "{n}'s password is {v}", "The password set for {n} is {v}", "The secret password that {n} uses is {v}"],
        ["Password", "Secret password", "Pass"],
        ["What is the password of {n}?", "What is {n}'s password?", "Which password does {n} use?",
         "What password was given to {n}?", "With which password does {n} sign in?"]),
    "age": Kind(
        number(16, 99),
        ["is {v} years old", "is aged {v}", "has reached the age of {v}", "turned {v} this year", "is {v} years of age"],
        ["The age of {n} is {v}", "{n}'s age is {v}", "At the moment {n} is {v} years old", "This year {n} is {v}"],
        ["Age", "Years of age", "Age in years"],
        ["How old is {n}?", "What is the age of {n}?", "What is {n}'s age?", "How many years old is {n}?", "What age is {n}?"],
        aside="aged {v}"),
    "colour": Kind(
        colour,
        ["likes the colour {v} best", "prefers the colour {v}", "loves the colour {v}", "always paints in {v}", "chose the colour {v}"],
        ["The favourite colour of {n} is {v}", "{n}'s favourite colour is {v}", "The colour that {n} likes best is {v}"],
        ["Favourite colour", "Colour", "Likes the colour"],
        ["What is {n}'s favourite colour?", "Which colour does {n} like best?", "What is the favourite colour of {n}?",
         "What colour does {n} prefer?", "Which colour is {n}'s favourite?"]),
    "pet": Kind(
        pet,
        ["keeps {a} {w} called {v}", "has {a} {w} named {v}", "owns {a} {w} that answers to {v}", "looks after {a} {w} called {v}"],
        ["The name of {n}'s {w} is {v}", "{n}'s {w} is called {v}", "The {w} that {n} keeps is called {v}", "The pet of {n} is {a} {w} named {v}"],
        ["Pet", "Animal", "Keeps"],
        ["What is {n}'s pet called?", "What is the name of {n}'s animal?", "What is the name of {n}'s pet?",
         "What is the name of the {w} that {n} keeps?", "What is {n}'s {w} called?"],
        ["What kind of animal does {n} keep?", "Which animal does {n} have?", "What sort of pet does {n} keep?"],
        item="{v} ({w})"),
    "friend": Kind(
        somebody,
        ["is a close friend of {v}", "has been friends with {v} since school", "has a best friend in {v}", "is best friends with {v}"],
        ["The best friend of {n} is {v}", "{n}'s best friend is {v}", "The closest friend that {n} has is {v}"],
        ["Best friend", "Friend", "Close friend"],
        ["Who is {n}'s best friend?", "Who is the best friend of {n}?", "Who is a friend of {n}?", "Who is {n}'s closest friend?",
         "With whom is {n} friends?"]),
    "born": Kind(
        number(1900, 2006),
        ["was born in {v}", "came into the world in {v}", "has a birth certificate from {v}"],
        ["The birth year of {n} is {v}", "{n}'s year of birth is {v}", "It was in {v} that {n} was born", "The year in which {n} was born is {v}"],
        ["Born", "Year of birth", "Birth year", "Born in"],
        ["When was {n} born?", "In which year was {n} born?", "What is {n}'s year of birth?", "What is the birth year of {n}?",
         "What year was {n} born in?"],
        aside="born in {v}"),
    "room": Kind(
        number(1, 899),
        ["sleeps in room {v}", "has room {v}", "is staying in room {v}", "works in room {v}", "was moved to room {v}"],
        ["The room of {n} is number {v}", "{n}'s room is number {v}", "The number on {n}'s room is {v}", "The room kept for {n} is room {v}"],
        ["Room", "Room number", "Room no."],
        ["Which room is {n} in?", "What is {n}'s room number?", "What is the number of {n}'s room?", "In which room is {n}?",
         "Which room does {n} have?"]),
    "goods": Kind(
        one_of(GOODS),
        ["sells {v}", "deals in {v}", "trades in {v}", "has a stall with {v}", "brings {v} to the market", "makes money with {v}"],
        ["The goods that {n} sells are {v}", "{n}'s stall is full of {v}", "What {n} sells is {v}", "The market knows {n} for {v}"],
        ["Sells", "Goods", "Wares", "Deals in"],
        ["What does {n} sell?", "What goods does {n} sell?", "In what does {n} deal?", "What does {n} trade in?",
         "What are {n}'s goods?", "What does {n} bring to the market?"]),
    "instrument": Kind(
        one_of(INSTRUMENTS),
        ["plays the {v}", "is learning the {v}", "practises the {v} at night", "performs on the {v}", "is good at the {v}"],
        ["The instrument of {n} is the {v}", "{n}'s instrument is the {v}", "The instrument that {n} plays is the {v}"],
        ["Instrument", "Plays", "Plays the"],
        ["What instrument does {n} play?", "Which instrument does {n} play?", "What is {n}'s instrument?", "What is the instrument of {n}?",
         "What musical instrument does {n} play?"]),
    "dish": Kind(
        one_of(DISHES),
        ["likes to eat {v}", "never says no to {v}", "always orders {v}", "is fond of {v}", "eats {v} every week"],
        ["The favourite dish of {n} is {v}", "{n}'s favourite dish is {v}", "The food that {n} likes best is {v}", "At the inn {n} orders {v}"],
        ["Favourite dish", "Favourite food", "Dish", "Eats"],
        ["What is {n}'s favourite dish?", "What does {n} like to eat?", "What food does {n} like best?", "What is the favourite food of {n}?",
         "Which dish does {n} order?"]),
    "sister": Kind(
        somebody,
        ["has a sister called {v}", "is the younger brother of {v}", "has one sister, {v}", "grew up with a sister named {v}"],
        ["The sister of {n} is {v}", "{n}'s sister is called {v}", "The name of {n}'s sister is {v}"],
        ["Sister", "Sister's name", "Sibling"],
        ["Who is {n}'s sister?", "Who is the sister of {n}?", "What is the name of {n}'s sister?", "What is {n}'s sister called?"]),
    "boat": Kind(
        boat,
        ["sails the {v}", "owns a boat called the {v}", "goes to sea on the {v}", "bought a boat named the {v}", "works aboard the {v}"],
        ["The boat of {n} is the {v}", "{n}'s boat is called the {v}", "The name of {n}'s boat is the {v}", "The boat that {n} sails is the {v}"],
        ["Boat", "Ship", "Sails", "Vessel"],
        ["What is {n}'s boat called?", "What is the name of {n}'s boat?", "Which boat does {n} sail?", "On which boat does {n} sail?",
         "What is the name of the boat of {n}?"]),
    "badge": Kind(
        badge,
        ["wears badge {v}", "carries the badge {v}", "was issued badge {v}", "has badge number {v}"],
        ["The badge of {n} reads {v}", "{n}'s badge number is {v}", "The badge number of {n} is {v}", "The number on {n}'s badge is {v}"],
        ["Badge", "Badge number", "Badge no."],
        ["What is {n}'s badge number?", "What is the badge number of {n}?", "Which badge does {n} wear?", "What does the badge of {n} read?",
         "What number is on {n}'s badge?"]),
    "day": Kind(
        one_of(DAYS),
        ["comes to market every {v}", "has the day off on {v}", "is free on {v}", "rests every {v}"],
        ["The free day of {n} is {v}", "{n}'s day off is {v}", "The day on which {n} rests is {v}"],
        ["Day off", "Free day", "Free on"],
        ["Which day does {n} have off?", "On which day is {n} free?", "What is {n}'s day off?", "When is {n}'s free day?",
         "What is the free day of {n}?"]),
    "birthday": Kind(
        lambda doc: value(f"{doc.rng.randint(1, 28)} {doc.rng.choice(MONTHS)}"),
        ["has a birthday on {v}", "celebrates a birthday on {v}", "blows out candles on {v}"],
        ["The birthday of {n} is {v}", "{n}'s birthday is on {v}", "The birthday of {n} falls on {v}"],
        ["Birthday", "Date of birthday", "Birthday on"],
        ["When is {n}'s birthday?", "What is the birthday of {n}?", "On what date is {n}'s birthday?", "What date is {n}'s birthday?"]),
    "wage": Kind(
        number(12, 980),
        ["earns {v} coins a month", "is paid {v} coins a month", "takes home {v} coins a month", "gets {v} coins each month"],
        ["The wage of {n} is {v} coins a month", "{n}'s wage is {v} coins", "The monthly wage of {n} comes to {v} coins"],
        ["Wage", "Monthly wage", "Coins a month", "Wage in coins"],
        ["How much does {n} earn?", "What is {n}'s wage?", "How many coins does {n} earn?", "What is the wage of {n}?",
         "How many coins a month is {n} paid?"]),
    "language": Kind(
        one_of(LANGUAGES),
        ["speaks {v} at home", "is learning {v}", "grew up speaking {v}", "teaches {v} on the side", "dreams in {v}"],
        ["The mother tongue of {n} is {v}", "{n}'s language is {v}", "The language that {n} speaks is {v}"],
        ["Language", "Speaks", "Mother tongue"],
        ["What language does {n} speak?", "Which language does {n} speak?", "What is {n}'s language?", "What is the mother tongue of {n}?"]),
}

TOWN_KINDS = {
    "river": Kind(
        river,
        ["lies on the river {v}", "stands on the banks of the {v}", "was built beside the river {v}"],
        ["The river that runs through {n} is the {v}", "{n}'s river is the {v}", "The river at {n} is called the {v}"],
        ["River", "River name", "On the river"],
        ["Which river runs through {n}?", "On which river does {n} lie?", "What is the river at {n} called?", "What is the name of {n}'s river?"]),
    "founded": Kind(
        number(1050, 1899),
        ["was founded in {v}", "dates from {v}", "received its charter in {v}", "goes back to {v}"],
        ["The founding year of {n} is {v}", "It was in {v} that {n} was founded", "The charter of {n} was signed in {v}"],
        ["Founded", "Year founded", "Charter"],
        ["When was {n} founded?", "In which year was {n} founded?", "What is the founding year of {n}?", "What year was {n} founded in?"]),
    "mayor": Kind(
        somebody,
        ["elected {v} as mayor", "is governed by {v}, the mayor", "has a mayor called {v}"],
        ["The mayor of {n} is {v}", "{n}'s mayor is {v}", "The town of {n} has a mayor named {v}"],
        ["Mayor", "Mayor's name"],
        ["Who is the mayor of {n}?", "Who is {n}'s mayor?", "What is the name of the mayor of {n}?", "Who governs {n}?"]),
    "known for": Kind(
        one_of(GOODS),
        ["is known for its {v}", "is famous for {v}", "exports {v}", "grew rich on {v}"],
        ["The town of {n} is known for {v}", "The pride of {n} is its {v}", "Merchants visit {n} for its {v}"],
        ["Known for", "Famous for", "Exports"],
        ["What is {n} known for?", "For what is {n} famous?", "What does {n} export?", "What is the pride of {n}?"]),
    "population": Kind(
        population,
        ["has as many as {v} inhabitants", "is home to {v} people", "counts {v} people", "has a population of {v}"],
        ["The population of {n} is {v}", "{n}'s population is {v}", "The number of people in {n} is {v}"],
        ["Population", "Inhabitants", "People"],
        ["What is the population of {n}?", "How many people live in {n}?", "How many inhabitants does {n} have?", "What is {n}'s population?"]),
    "tower": Kind(
        number(11, 140),
        ["has a tower {v} metres high", "is watched over by a tower of {v} metres", "built a tower of {v} metres"],
        ["The tower of {n} is {v} metres high", "The height of {n}'s tower is {v} metres", "{n}'s tower measures {v} metres"],
        ["Tower", "Tower height", "Height of tower"],
        ["How high is the tower of {n}?", "What is the height of {n}'s tower?", "How many metres high is {n}'s tower?",
         "How tall is the tower of {n}?"],
        item="{v} metres"),
}

ASK_WRAPS = ["According to the text, {q}", "Please tell me: {q}", "Tell me, {q}", "Can you say: {q}", "Quick question: {q}",
             "From the document: {q}", "I would like to know: {q}", "And {q}", "So {q}", "One more: {q}"]
OFF_TOPIC = ["What is the capital of France?", "How are you?", "Who are you?", "What is the weather like?", "Hello.", "Hi!",
             "What is two plus two?", "Write a poem about the sea.", "Who wrote this?", "What time is it?", "Thank you.",
             "Can you help me?", "What can you do?", "Tell me a joke.", "What is your name?", "Who won the match?"]


# ---------------------------------------------------------------------------------------------
# Documents

class Entity:
    def __init__(self, full, short, kinds, count, rng):
        self.full, self.short, self.kinds = full, short, kinds
        self.todo = rng.sample(sorted(kinds), min(count, len(kinds)))
        self.stated = {}


class Document:
    """A document of at most `budget` bytes; `facts` lists (entity, kind's name) as they occur."""

    def __init__(self, rng, budget):
        self.rng = rng
        self.names = Names(rng)
        self.entities, self.open, self.towns, self.facts = [], [], [], []
        self.current = None
        # Each document has its own manner.
        self.filler = rng.choice((0.0, 0.1, 0.2, 0.3, 0.45))
        self.stay = rng.choice((0.1, 0.4, 0.7, 0.9))  # chance of the next sentence being on the same subject
        self.pool = rng.randint(1, 12)  # subjects that are under way at once
        self.compound = rng.choice((0.0, 0.15, 0.4))
        self.lead = rng.choice((0.0, 0.05, 0.2))
        self.short_names = 0.5 if rng.random() < 0.3 else 0.0
        self.town_share = rng.choice((0.0, 0.1, 0.3))
        self.listing = rng.choice((0.0, 0.0, 0.03, 0.15))
        self.headings = rng.choice((0.0, 0.0, 0.08, 0.2))
        self.paragraph = rng.choice((1, 3, 5, 8))
        self.gap = rng.choice(("\n\n", "\n\n", "\n\n", "\n"))
        self.text = self.write(budget)
        if rng.random() < 0.05:
            self.text = self.text.replace("'", "’")  # may overrun the budget by a little; callers cut

    # Subjects and values

    def new_entity(self):
        rng = self.rng
        count = rng.choice((1, 2, 3, 4, 5, 6, 8, 10))
        if rng.random() < self.town_share:
            entity = Entity(*self.names.town(), TOWN_KINDS, count, rng)
            self.towns.append(entity.full)
        else:
            entity = Entity(*self.names.person(), PERSON_KINDS, count, rng)
        self.entities.append(entity)
        self.open.append(entity)
        return entity

    def next_entity(self):
        rng = self.rng
        if self.current and self.current.todo and rng.random() < self.stay:
            return self.current
        self.open = [entity for entity in self.open if entity.todo]
        self.current = self.new_entity() if len(self.open) < self.pool else rng.choice(self.open)
        return self.current

    def some_town(self):
        rng = self.rng
        if not self.towns or rng.random() < 0.3:
            self.towns.append(self.names.town()[0])
        return rng.choice(self.towns)

    def other_person(self):
        rng = self.rng
        others = [e.full for e in rng.sample(self.entities, min(4, len(self.entities)))
                  if e is not self.drawing and e.kinds is PERSON_KINDS]
        return others[0] if others and rng.random() < 0.5 else self.names.person()[0]

    def name(self, entity):
        return entity.short if self.rng.random() < self.short_names else entity.full

    def draw(self, entity, kind):
        self.drawing = entity
        return entity.kinds[kind].draw(self)

    # Sentences; each returns (text, [(entity, kind, fields)])

    def sentence(self):
        rng = self.rng
        entity = self.next_entity()
        wanted = 1
        if rng.random() < self.compound:
            wanted = rng.choice((2, 2, 3))
        chosen = [(kind, self.draw(entity, kind)) for kind in entity.todo[:wanted]]
        name = self.name(entity)
        if len(chosen) == 1 and rng.random() < 0.5:
            kind, fields = chosen[0]
            text = rng.choice(entity.kinds[kind].sentences)
            starts_with_name = text.startswith("{n}")
            text = text.format(n=name, **fields)
        else:
            starts_with_name = True
            aside = ""
            clauses = list(chosen)
            if len(clauses) > 1 and entity.kinds[clauses[0][0]].aside and rng.random() < 0.6:
                kind, fields = clauses.pop(0)
                aside = f", {entity.kinds[kind].aside.format(**fields)},"
            phrases = [rng.choice(entity.kinds[kind].verbs).format(**fields) for kind, fields in clauses]
            joined = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + rng.choice((" and ", " and ", ", and ")) + phrases[-1]
            text = f"{name}{aside} {joined}"
        if rng.random() < self.lead:
            text = f"{rng.choice(LEAD_INS)} {text if starts_with_name else text[0].lower() + text[1:]}"
        elif rng.random() < self.lead / 3:
            text += rng.choice(TAILS)
        return text + ".", [(entity, kind, fields) for kind, fields in chosen]

    def record(self):
        """A list of facts under the subject's name."""
        rng = self.rng
        entity = self.new_entity()
        chosen = [(kind, self.draw(entity, kind)) for kind in entity.todo]
        style = rng.choice(("heading", "colon", "line", "dash"))
        items = []
        for kind, fields in chosen:
            label = rng.choice(entity.kinds[kind].labels)
            if style in ("line", "dash"):
                label = label[0].lower() + label[1:]
            items.append(f"{label}: {entity.kinds[kind].item.format(**fields)}")
        if style == "heading":
            text = f"{rng.choice(('##', '###'))} {entity.full}\n\n" + "\n".join("- " + item for item in items)
        elif style == "colon":
            bullet = rng.choice(("-", "*"))
            text = f"{entity.full}:\n" + "\n".join(f"{bullet} {item}" for item in items)
        elif style == "line":
            text = f"{rng.choice(('**%s**', '%s'))}: " % entity.full + "; ".join(items) + "."
        else:
            text = f"- {entity.full} - " + ", ".join(items)
        return text, [(entity, kind, fields) for kind, fields in chosen]

    def filler_sentence(self):
        rng = self.rng
        style = rng.random()
        if style < 0.45:
            noun = f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" if rng.random() < 0.6 else f"The {rng.choice(NOUNS)}"
            other = f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" if rng.random() < 0.4 else f"the {rng.choice(NOUNS)}"
            text = f"{noun} {rng.choice(PAST_VERBS)} {other}"
            if rng.random() < 0.4:
                text += " " + rng.choice(WHEN)
            return text + "."
        if style < 0.7 and self.entities:
            entity = rng.choice(self.entities)
            if entity.kinds is PERSON_KINDS:
                return f"{self.name(entity)} {rng.choice(DOINGS)}{rng.choice(['', ' ' + rng.choice(WHEN)])}."
        if style < 0.85:
            return rng.choice((f"In {rng.randint(1700, 2020)} the {rng.choice(NOUNS)} burned down.",
                               f"The clock struck {rng.randint(1, 12)}.",
                               f"There were {rng.randint(2, 400)} {rng.choice(GOODS)} in the {rng.choice(NOUNS)}.",
                               f"Some {rng.choice(TRADES)}s met near the {rng.choice(NOUNS)} on {rng.choice(DAYS)}.",
                               f"Bus {rng.randint(1, 99)} stops at the {rng.choice(NOUNS)}.",
                               f"A {rng.choice(COLOURS)} {rng.choice(ANIMALS)} ran across the {rng.choice(NOUNS)}."))
        return rng.choice(REMARKS)

    def heading(self):
        rng = self.rng
        words = rng.choice(SECTIONS) if rng.random() < 0.6 else f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        style = rng.random()
        if style < 0.6:
            return f"{rng.choice(('#', '##', '##'))} {words}"
        return words.upper() if style < 0.8 else f"Chapter {rng.randint(1, 30)}: {words}"

    def write(self, budget):
        rng = self.rng
        parts, size, sentences, misses = [], 0, 0, 0
        glue = ""
        while misses < 4:
            facts = []
            roll = rng.random()
            own_block = False
            if sentences == 0 and roll < self.headings and glue != "":
                text, own_block = self.heading(), True
            elif roll < self.listing:
                (text, facts), own_block = self.record(), True
            elif rng.random() < self.filler:
                text = self.filler_sentence()
            else:
                text, facts = self.sentence()
            if own_block and parts:
                glue = "\n\n"
            if size + len(glue) + len(text) > budget and (self.facts or misses < 3):
                misses += 1
                if own_block and facts:
                    facts[0][0].todo = []  # its name has not been seen, nor will be
                    self.entities.remove(facts[0][0])
                continue
            parts += [glue, text]
            size += len(glue) + len(text)
            for entity, kind, fields in facts:
                entity.stated[kind] = fields
                entity.todo.remove(kind)
                self.facts.append((entity, kind))
            sentences += 1
            if own_block:
                sentences, glue = 0, "\n\n"
            elif sentences >= self.paragraph and rng.random() < 0.5:
                sentences, glue = 0, self.gap
            else:
                glue = " "
        return "".join(parts)

    # Questions

    def phrase(self, entity, ask, fields):
        rng = self.rng
        name = entity.short if rng.random() < 0.2 else entity.full
        question = ask.format(n=name, **fields)
        if rng.random() < 0.08:
            question = rng.choice(ASK_WRAPS).format(q=question[0].lower() + question[1:])
        if rng.random() < 0.05:
            question = question.rstrip("?")
        if rng.random() < 0.04:
            question = question.lower()
        return question

    def answerable(self, fact):
        entity, kind = fact
        ask, field = self.rng.choice(entity.kinds[kind].asks)
        fields = entity.stated[kind]
        return self.phrase(entity, ask, fields), fields[field] + "."

    def unanswerable(self):
        """A question the document does not answer."""
        rng = self.rng
        if rng.random() < 0.1:
            return rng.choice(OFF_TOPIC), NOT_STATED
        known = [entity for entity in self.entities if entity.stated]
        if known and rng.random() < 0.6:
            entity = rng.choice(known)
        else:
            entity = Entity(*self.names.person(), PERSON_KINDS, 0, rng)
        kind = rng.choice([kind for kind in entity.kinds if kind not in entity.stated and kind not in ("friend", "sister")] or ["none"])
        if kind == "none":
            return rng.choice(OFF_TOPIC), NOT_STATED
        ask, _ = rng.choice(entity.kinds[kind].asks)
        return self.phrase(entity, ask, self.draw(entity, kind)), NOT_STATED


# ---------------------------------------------------------------------------------------------
# Training sequences and evaluation questions

def training_sequence(rng, length, unanswerable):
    """Tokens of one sequence and what each is (IS_TEXT, ...), both of exactly `length`."""
    document = Document(rng, int(length * rng.uniform(0.35, 0.92)))
    gap = "\n\n" if rng.random() < 0.96 else rng.choice(("\n", "\n\n\n"))
    text = document.text if rng.random() > 0.005 else ""
    tokens = encode(text + gap)
    kinds = [IS_TEXT] * len(tokens)
    facts = []
    while len(tokens) < length:
        if not facts:
            facts = rng.sample(document.facts, len(document.facts))
        if rng.random() < unanswerable or not text:
            question, answer = document.unanswerable()
        else:
            question, answer = document.answerable(facts.pop())
        asked, answered = encode(f"Q: {question}\nA:"), encode(" " + answer)
        tokens += asked + answered + [EOS] + encode("\n")
        kinds += [IS_TEXT] * len(asked) + [IS_ANSWER, IS_FIRST] + [IS_ANSWER] * (len(answered) - 2) + [IS_EOS, IS_TEXT]
    return tokens[:length], kinds[:length]


def training_batch(seed, rows, length, unanswerable):
    """uint8 array of [2, rows, length]: the tokens, and what each is."""
    rng = random.Random(f"train {seed}")
    batch = np.empty((2, rows, length), np.uint8)
    for row in range(rows):
        batch[0, row], batch[1, row] = training_sequence(rng, length, unanswerable)
    return batch


def evaluation_document(seed, tokens, index):
    """A fresh document of about `tokens` tokens with four questions: three it answers, one it does not.

    The seeds are apart from the training's whatever their numbers.
    """
    rng = random.Random(f"evaluation {seed} {tokens} {index}")
    document = Document(rng, tokens - 420)  # leaves room for the four
    facts = rng.sample(document.facts, min(3, len(document.facts)))
    turns = [document.answerable(fact) for fact in facts]
    return document.text, turns + [document.unanswerable()]


def raw_prompt(document, question):
    return f"{document}\n\nQ: {question}\nA:"
