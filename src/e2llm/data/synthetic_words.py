"""Word lists and code-line patterns that the synthetic passages draw from. Plain data.

None of the evaluation's words (a "pass key") can be put together from these. In CODE_LINES, @ stands for an identifier
and % for a number.
"""

NOUNS: tuple[str, ...] = tuple(
    """account anchor apple archive arrow autumn badge bakery balance banner barrel basin basket beacon bell bench bird
    blanket board boat bottle branch bread bridge broom bucket buffer button cabin cable camera candle canvas
    captain card carpet castle cellar chain chair channel chapter child church circle city clock cloud coast
    coat code colour column copper corner cotton counter country cousin crown cup curtain customer dancer desk
    device diamond dinner doctor door dragon drawer driver drum eagle engine entry evening factory family farmer
    feather fence ferry field filter finger flag flower folder forest fountain frame friend garden gate giant
    glass glove gold grain grape guard guitar hammer harbour harvest hat hill history holiday honey horse hotel
    house index island jacket journal judge jungle kettle kitchen ladder lake lamp lantern leader leather lemon
    letter level library lion list market master meadow memory merchant metal mirror model money monkey morning
    mountain museum music nation needle nephew network node number oak ocean office olive orange order orchard
    owner packet page paint palace paper parent parcel park parser pattern pencil pepper piano picture pilot
    pipe planet plate pocket poet point port prince printer prison project queen question queue record region
    report ribbon rice ring river road robin rocket roof room rope route sailor salt sample school screen server
    shadow sheep shelf ship shirt shoe signal silver singer sister sky soldier song spider spoon square stable
    station stone storm story street student sugar summer table tailor target teacher temple tent theatre thread
    ticket tiger token tower town track train tree triangle tunnel uncle valley vessel village violin voice
    wagon wall water weather wheel whistle widow window winter wire witness wolf worker writer yard""".split()
)

ADJECTIVES: tuple[str, ...] = tuple(
    """ancient angry big bitter black blue bold brave bright broad broken brown calm careful cheap clean clever cold
    common cool curious dark deep distant double dry early eastern empty equal exact famous fast final fine
    first flat foreign fresh full gentle golden grand great green grey happy hard heavy hidden high hollow
    honest hot huge inner kind large last late lazy left light little local lonely long loud low lucky main
    middle modern narrow new noble noisy northern odd old open outer pale plain polite poor private proud public
    quick quiet rare red rich right rough round royal second secret sharp short silent simple slow small soft
    solid southern spare steep strange strong sweet tall thick thin third tiny upper usual warm weak western wet
    white wide wild wise wooden yellow young""".split()
)

VERBS: tuple[str, ...] = tuple(
    """asked became began broke brought built called carried caught changed chose closed covered crossed cut drew drove
    ended entered fell felt filled followed forgot found gave grew held helped hid joined kept knew laughed led
    left lost loved made met missed moved needed noticed offered opened painted played pulled pushed raised ran
    reached rested returned said saw sent served shook showed slept sold spoke stayed stood stopped talked
    taught told took touched turned used visited waited walked wanted washed watched went wished won worked
    wrote""".split()
)

FUNCTION_WORDS: tuple[str, ...] = tuple(
    """the a this that every some no one another and but or with without near under over behind before after from into
    for about against along around between beyond by down since through toward until upon while because when
    where their his her our my its each both few many most such only then there still again soon""".split()
)

CODE_LINES: tuple[str, ...] = (
    "def @(self, @, @=None):",
    "    return @(@, %)",
    "    if @ is None:",
    "        raise ValueError(@)",
    "    for @ in @(%):",
    "        @.append(@)",
    "    @ = @.get(@, %)",
    "import @",
    "from @ import @",
    "    self.@ = @",
    "class @(@):",
    "    # @ of @",
    "@ = [%, %, %]",
    "    while @ < %:",
    "        @ += %",
    '    """@."""',
    "    with @(@) as @:",
    "    try:",
    "    except @:",
    "        continue",
    "    @[@] = @ + %",
    "    assert @(@) != @",
    "    return [@ for @ in @ if @]",
    "@(@, %, @)",
)
