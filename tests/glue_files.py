"""A few rows of every GLUE task in the layout of the official files; the text is invented."""

from pathlib import Path

PARSES = "( a ( tree ) )\t( b )\t(ROOT a)\t(ROOT b)"

LAYOUTS = {
    "CoLA": {
        "train.tsv": "xx01\t1\t\tThe kettle sang.\nxx01\t0\t*\tKettle the sang.\n",
        "dev.tsv": "xx02\t1\t\tA gull landed.",
        "test.tsv": "index\tsentence\n0\tWe rowed home.\n",
    },
    "SST-2": {
        "train.tsv": 'sentence\tlabel\na " warm \t1\ndull and long \t0\n',
        "dev.tsv": "sentence\tlabel\na delight .\t1\n",
        "test.tsv": "index\tsentence\n0\tnot bad .\n",
    },
    "MRPC": {
        "train.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        '1\t11\t12\tHe said " no .\tNo , he said .\n0\t13\t14\tRain fell .\tThe sun shone .\n',
        "dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t15\t16\tA .\tB .\n",
        "test.tsv": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t17\t18\tC .\tD .\n",
    },
    "STS-B": {
        "train.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\t"
        "sentence2\tscore\n0\tg\tf\t2012\t1\tnone\tnone\tA dog runs.\tA dog is running.\t4.800\n"
        "1\tg\tf\t2012\t2\tnone\tnone\tA dog runs.\tRice boils.\t0\n",
        "dev.tsv": "index\tsentence1\tsentence2\tscore\n0\tx\ty\t2.5\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\tx\ty\n",
    },
    "QQP": {
        "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tHow far is it?\tWhat is the distance?\t1\n4\t5\t6\tWhy?\tWho?\t0\n",
        "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta\tb\t0\n",
        "test.tsv": "id\tquestion1\tquestion2\n0\ta\tb\n",
    },
    "MNLI": {
        "train.tsv": "index\tpromptID\tpairID\tgenre\ts1b\ts2b\ts1p\ts2p\tsentence1\tsentence2\t"
        f"label1\tgold_label\n0\t1\t1n\tmail\t{PARSES}\tIt rained.\tIt poured.\tneutral\tneutral\n"
        f"1\t1\t1c\tmail\t{PARSES}\tIt rained.\tIt was dry.\tneutral\tcontradiction\n",
        "dev_matched.tsv": "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
        "0\ta\tb\tneutral\tneutral\tentailment\n",
        "dev_mismatched.tsv": "index\tsentence1\tsentence2\tgold_label\n0\tc\td\tneutral\n",
        "test_matched.tsv": "index\tsentence1\tsentence2\n0\te\tf\n",
        "test_mismatched.tsv": "index\tsentence1\tsentence2\n0\tg\th\n",
    },
    "QNLI": {
        "train.tsv": "index\tquestion\tsentence\tlabel\n0\tWhere is it?\tIt is here.\tentailment\n"
        "1\tWhere is it?\tIt is red.\tnot_entailment\n",
        "dev.tsv": "index\tquestion\tsentence\tlabel\n0\ta\tb\tentailment\n",
        "test.tsv": "index\tquestion\tsentence\n0\ta\tb\n",
    },
    "RTE": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tIt is red.\tIt has a colour.\t"
        "entailment\n1\tIt is red.\tIt is small.\tnot_entailment\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\ta\tb\n",
    },
    "WNLI": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tThe cup fell, it broke.\tThe cup "
        "broke.\t1\n1\tThe cup fell, it broke.\tThe floor broke.\t0\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t0\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\ta\tb\n",
    },
    "AX": {"ax.tsv": "index\tsentence1\tsentence2\n0\tThe door is shut.\tIt is open.\n"},
}


def write_every_task(root: Path) -> Path:
    """Write the files below a folder, and return it."""
    for name, files in LAYOUTS.items():
        (root / name).mkdir(parents=True)
        for file, text in files.items():
            (root / name / file).write_text(text, encoding="utf-8")
    return root
