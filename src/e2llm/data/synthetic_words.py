"""Word lists and code-line patterns that the synthetic passages draw from. Plain data.

The evaluation's words ("pass" and "key") stand in CODE_WORDS; synthetic.py never puts the two into one name. In
CODE_LINES, @ stands for an identifier and % for a number.
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

CODE_WORDS: tuple[str, ...] = tuple(
    """and as assert async await break class continue def del elif else except finally for from global if import in is
    lambda nonlocal not or pass raise return try while with yield all any ascii bin bool bytes callable chr compile
    complex dict dir enumerate eval exec filter float format frozenset hash help hex id input int isinstance iter len
    list map max memoryview min next object oct open ord pow print property range repr reversed round set slice sorted
    staticmethod str sum super tuple type vars zip key keys value values word words name names path paths line lines
    text data error errors size length start stop end first last left right args kwargs self other result results
    request response header headers body client server host port socket thread process lock queue task event loop
    handler logger record level message parser option options default field fields item items index offset count total
    test tests case module package version build cache config context state status mode method function argument
    parameter address domain email user group owner secret phrase door gate code number date time day hour week month
    year title author chapter section page note answer question reason place street""".split()
)
