"""Real-world tables of paths and labels, with the expected results."""
# ruff: noqa: E501, SIM905  (a row of a table is a line)

import json
from pathlib import Path

from tests.corpus import Case, Files, photo, photos

FOUR = photos("0.png", "1.png", "2.png", "3.png")
CATS = {"train": {"cat": "0.png 2.png", "dog": "1.png 3.png"}}  # what most of the readable ones come to
ROWS = ["0.png,cat", "1.png,dog", "2.png,cat", "3.png,dog"]


def many(count: int = 12) -> dict[str, bytes]:
    return photos(*(f"{i}.png" for i in range(count)))


def csv(*lines: str, header: str = "path,label", name: str = "t.csv") -> Files:
    """Four images and a table."""
    return FOUR | {name: "\n".join([header, *lines]) + "\n"}


def jsonl(*labels: object) -> Files:
    rows = [json.dumps({"path": f"{i}.png", "label": label}) + "\n" for i, label in enumerate(labels)]
    return many(len(labels)) | {"t.jsonl": "".join(rows)}


def splits(column: str, *values: str, labels: str = "cat dog cat dog") -> Files:
    """A row for each value of a column."""
    rows = [f"{i}.png,{labels.split()[i % 4]},{value}" for i, value in enumerate(values)]
    return many(len(values)) | {"t.csv": "\n".join([f"path,label,{column}", *rows]) + "\n"}


PLAIN = [
    Case("plain", csv(*ROWS), "t.csv", CATS, decided=("images: column 'path'", "labels: column 'label'")),
    Case("path-outside", {"a.png": photo(), "lists/t.csv": "path,label\n../a.png,cat\n"}, "lists/t.csv",
         error=("line 2", "a.png is outside of", "--allow-outside")),
    Case("path-outside-asked-for", photos("a.png", "b.png") | {"lists/t.csv": "path,label\n../a.png,cat\n../b.png,dog\n"},
         "lists/t.csv", {"train": {"cat": 1, "dog": 1}}, options={"allow_outside": True}),
    Case("a-url", csv("https://example.org/0.png,cat"), "t.csv", error=("line 2", "download")),
    Case("no-rows", csv(), "t.csv", error="no rows"),
    Case("an-empty-file", {"t.csv": ""}, "t.csv", error="no rows"),
    Case("blank-lines-and-blank-rows", csv("", *ROWS, "", " , ", ","), "t.csv", CATS),
    Case("windows-line-ends", FOUR | {"t.csv": "\r\n".join(["path,label", *ROWS]).encode()}, "t.csv", CATS),
    Case("old-mac-line-ends", FOUR | {"t.csv": "\r".join(["path,label", *ROWS]).encode()}, "t.csv", CATS),
    Case("no-image-is-there", {"t.csv": "path,label\n0.png,cat\n1.png,dog\n"}, "t.csv",
         error=("none of the 2 images", "0.png, line 2", "--image-folder")),
    Case("some-images-are-missing", csv(*ROWS, "4.png,cat"), "t.csv",
         {"train": {"cat": "0.png 2.png 4.png", "dog": "1.png 3.png"}},
         warned="1 of 5 images do not exist (first: 4.png, line 6)"),
    Case("an-image-listed-twice", csv(*ROWS, "0.png,cat"), "t.csv",
         {"train": {"cat": "0.png 2.png 0.png", "dog": "1.png 3.png"}}, warned="1 rows name an image twice"),
    Case("an-image-with-two-labels", csv(*ROWS, "0.png,dog"), "t.csv",
         {"train": {"cat": 2, "dog": 3}}, warned="1 rows name an image with two labels"),
]  # fmt: skip

COMMAS = [  # and other ways in which a row is not what its writer meant
    Case("unquoted-comma", csv("0.png,crane, bird", "1.png,maillot"), "t.csv",
         error=("line 2 has 3 cells", "the header 2", "in quotes")),
    Case("unquoted-comma-before-a-split", csv("0.png,maillot,train", "1.png,crane, bird,train", header="path,label,split"),
         "t.csv", error=("line 3 has 4 cells", "crane | bird")),
    Case("quoted-comma", csv('0.png,"crane, bird"', '1.png,"crane, machine"'), "t.csv",
         {"train": {"crane, bird": "0.png", "crane, machine": "1.png"}}),
    Case("a-row-too-short", csv("0.png,cat,x", "1.png", header="path,label,note"), "t.csv",
         error=("line 3 has 1 cells", "fill in")),
    Case("an-open-quote", csv('0.png,"cat', *ROWS[1:]), "t.csv", error="unexpected end of data"),
    Case("an-open-quote-and-much-text", csv('0.png,"cat', *ROWS[1:], *["x" * 999] * 150), "t.csv",
         error=("line 137", "a cell has over 131,072 characters; close the open quote")),
    Case("a-long-cell", csv(*ROWS, "3.png," + "x" * 140_000), "t.csv", error=("line 6", "a cell has over 131,072 char")),
    Case("two-open-quotes", csv('0.png,"cat', '1.png,"dog', *ROWS[2:]), "t.csv", error="line 3"),
    Case("line-ends-in-quotes", csv('0.png,"crane\r\nbird"', "1.png,maillot"), "t.csv",
         {"train": {"crane\r\nbird": "0.png", "maillot": "1.png"}}),
    Case("a-row-too-long-below-comments", csv("# drawn", "# by hand", "path,label", "", "0.png,crane, bird", header="sep=,"),
         "t.csv", error="line 6 has 3 cells"),
    Case("commas-at-the-ends-of-rows", csv(*(f"{row},," for row in ROWS)), "t.csv", CATS),
    Case("commas-at-all-ends", csv(*(f"{row}," for row in ROWS), header="path,label,"), "t.csv", CATS),
    Case("a-quote-in-a-cell", csv('0.png,5" disk', '1.png,3" disk'), "t.csv",
         {"train": {'3" disk': "1.png", '5" disk': "0.png"}}),
]  # fmt: skip

FORMS = [
    Case("semicolons", csv(*(row.replace(",", ";") for row in ROWS), header="path;label"), "t.csv", CATS,
         decided="';' between columns"),
    Case("semicolons-and-labels-with-commas", csv("0.png;crane, bird", "1.png;dog", header="path;label"), "t.csv",
         {"train": {"crane, bird": "0.png", "dog": "1.png"}}),
    Case("tabs-in-a-csv", csv(*(row.replace(",", "\t") for row in ROWS), header="path\tlabel"), "t.csv", CATS,
         decided="tabs between columns"),
    Case("commas-in-a-tsv", csv(*ROWS, name="t.tsv"), "t.tsv", CATS),
    Case("bars", csv(*(row.replace(",", "|") for row in ROWS), header="path|label"), "t.csv", CATS),
    Case("excels-sep-line", csv("path;label", *(row.replace(",", ";") for row in ROWS), header="sep=;"), "t.csv", CATS),
    Case("excels-sep-line-of-tabs", csv("path\tlabel", *(row.replace(",", "\t") for row in ROWS), header="sep=\t"), "t.csv", CATS),
    Case("no-header", FOUR | {"t.csv": "\n".join(ROWS)}, "t.csv", CATS, decided="no header"),
    Case("no-header-and-columns-by-number", FOUR | {"t.csv": "\n".join(f"x,{row},y,z" for row in ROWS)}, "t.csv", CATS,
         options={"image_column": "2", "label_column": "3"}),
    Case("no-header-ids", photos("a.jpg", "b.jpg") | {"t.csv": "a,cat\nb,dog\n"}, "t.csv",
         {"train": {"cat": "a.jpg", "dog": "b.jpg"}}, decided=("no header", ".jpg added")),
    Case("spaces-around-names-and-cells", csv(*(f" {row.replace(',', ' , ')} " for row in ROWS), header=" path , label "),
         "t.csv", CATS),
    Case("comment-lines", FOUR | {"t.csv": "# drawn, by hand\n# 2024\npath,label\n" + "\n".join(ROWS) + "\n# the end\n"},
         "t.csv", CATS, decided="3 comment lines"),
    Case("no-header-and-a-long-comment", FOUR | {"t.csv": "# " + "x" * 140_000 + "\n" + "\n".join(ROWS)}, "t.csv", CATS),
    Case("header-in-a-comment", FOUR | {"t.csv": "#path,label\n" + "\n".join(ROWS)}, "t.csv", CATS,
         decided="the header is a comment"),
    Case("utf-8-with-a-mark", FOUR | {"t.csv": "\n".join(["path,label", *ROWS]).encode("utf-8-sig")}, "t.csv", CATS),
    Case("utf-16", FOUR | {"t.csv": "\n".join(["path,label", "0.png,chat", "1.png,crème"]).encode("utf-16")}, "t.csv",
         {"train": {"chat": "0.png", "crème": "1.png"}}, decided="UTF-16"),
    Case("utf-16-without-a-mark", FOUR | {"t.csv": "\n".join(["path,label", *ROWS]).encode("utf-16-le")}, "t.csv", CATS,
         decided="UTF-16 without a byte order mark"),
    Case("latin-1", FOUR | {"t.csv": "path,label\n0.png,crème brûlée\n1.png,cat\n".encode("latin-1")}, "t.csv",
         {"train": {"cat": "1.png", "crème brûlée": "0.png"}}, warned=("read as Windows-1252 ('0.png,crème brûlée'",)),
    Case("latin-1-after-a-megabyte", FOUR | {"t.csv": (f"# {'x' * 600_000}\n" * 2 + "path,label\n0.png,crème\n1.png,cat\n")
                                             .encode("latin-1")}, "t.csv", {"train": {"cat": "1.png", "crème": "0.png"}},
         warned="read as Windows-1252 ('0.png,crème'"),
    Case("gbk-asked-for", FOUR | {"t.csv": "path,label\n0.png,猫\n1.png,狗\n".encode("gbk")}, "t.csv",
         {"train": {"狗": "1.png", "猫": "0.png"}}, options={"encoding": "gbk"}),
    Case("neither-utf-8-nor-western", FOUR | {"t.csv": "path,label\n0.png,ねこ\n1.png,スター\n".encode("shift_jis")}, "t.csv",
         error=("neither UTF-8 nor Windows-1252", "--encoding")),
    Case("no-such-encoding", csv(*ROWS), "t.csv", error="encoding 'klingon'", options={"encoding": "klingon"}),
    Case("a-zip-called-csv", {"t.csv": b"PK\x03\x04" + bytes(40)}, "t.csv", error="is not text"),
    Case("one-endless-line", {"t.csv": "path,label\n" + "x" * 1_000_001}, "t.csv", error="line 2 is over 1,000,000"),
    Case("backslashes", photos("a/0.png", "b/1.png") | {"t.csv": "path,label\na\\0.png,cat\nb\\1.png,dog\n"}, "t.csv",
         {"train": {"cat": "a/0.png", "dog": "b/1.png"}}),
    Case("unicode-forms", photos("cafe\u0301/u\u0308.png", "b.png")
         | {"t.csv": "path,label\ncaf\u00e9/\u00fc.png,cat\nb.png,dog\n"}, "t.csv",
         {"train": {"cat": "cafe\u0301/u\u0308.png", "dog": "b.png"}}, decided="another Unicode form"),
    Case("extension-in-other-case", photos("a.JPG", "b.JPG") | {"t.csv": "path,label\na.jpg,cat\nb.jpg,dog\n"}, "t.csv",
         {"train": {"cat": "a.JPG", "dog": "b.JPG"}}, decided="other case"),
]  # fmt: skip

KAGGLE = [  # and where images are
    Case("dog-breeds", photos("train/0a.jpg", "train/0b.jpg", "test/0c.jpg") | {"labels.csv": "id,breed\n0a,pug\n0b,akita\n"},
         "labels.csv", {"train": {"akita": "train/0b.jpg", "pug": "train/0a.jpg"}},
         decided=("images: column 'id'", "labels: column 'breed', the only other one", "of the images in train/ with .jpg added")),
    Case("columns-of-no-use", csv("0.png,cat,3,4", "1.png,dog,5,6", header="path,label,width,height"), "t.csv",
         {"train": {"cat": "0.png", "dog": "1.png"}}, decided="not used: column width, height"),
    Case("plant-pathology", photos("images/Train_0.jpg", "images/Train_1.jpg")
         | {"train.csv": "image_id,healthy,rust,scab\nTrain_0,0,1,0\nTrain_1,1,0,0\n"},
         "train.csv", {"train": {"healthy": "images/Train_1.jpg", "rust": "images/Train_0.jpg"}}, decided="one-hot in 3 columns: healthy"),
    Case("capital-id-and-label", photos("train/1.png", "train/2.png", "test/1.png", "test/2.png")
         | {"trainLabels.csv": "Id,Label\n1,frog\n2,truck\n"}, "trainLabels.csv",
         error="1 is in both test and train; give the folder of the images with --image-folder"),
    Case("the-tables-name-says-the-folder", photos("train/1.png", "train/2.png", "test/1.png", "test/2.png")
         | {"train_labels.csv": "Id,Label\n1,frog\n2,truck\n"}, "train_labels.csv",
         {"train": {"frog": "train/1.png", "truck": "train/2.png"}}),
    Case("the-split-says-the-folder", photos("train/1.png", "train/2.png", "test/1.png")
         | {"t.csv": "file,label,split\n1.png,frog,train\n2.png,truck,train\n1.png,truck,test\n"}, "t.csv",
         {"train": {"frog": "train/1.png", "truck": "train/2.png"}, "test": {"truck": "test/1.png"}}),
    Case("an-image-of-the-test-is-none-of-train", photos("train/1.png", "test/2.png")
         | {"train.csv": "id,label\n1,frog\n2,truck\n"}, "train.csv",
         {"train": {"frog": "train/1.png", "truck": "2"}}, warned="1 of 2 images do not exist (first: 2, line 3)"),
    Case("validation-images-in-the-folder-of-train", photos("train/1.png", "train/2.png")
         | {"t.csv": "file,label,split\n1.png,frog,train\n2.png,truck,val\n"}, "t.csv",
         {"train": {"frog": "train/1.png"}, "val": {"truck": "train/2.png"}}),
    Case("a-fold-of-the-folder-of-train", photos("train/1.png", "train/2.png", "test/1.png")
         | {"train.csv": "id,label,fold\n1,frog,0\n2,truck,1\n"}, "train.csv",
         {"train": {"truck": "train/2.png"}, "validation": {"frog": "train/1.png"}}, options={"fold": 0}),
    Case("class-folders-one-below", photos(*(f"{i % 3}/{i}.png" for i in range(6)))
         | {"t.csv": "file,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(6))}, "t.csv",
         {"train": {"a": "0/0.png 2/2.png 1/4.png", "b": "1/1.png 0/3.png 2/5.png"}},
         decided="6 of the images in 0/ and 2 more folders"),
    Case("ham10000", photos("part_1/ISIC_1.jpg", "part_2/ISIC_2.jpg", "part_2/ISIC_3.jpg")
         | {"metadata.csv": "lesion_id,image_id,dx,age\nH1,ISIC_1,nv,80\nH1,ISIC_2,mel,80\nH2,ISIC_3,nv,75\n"},
         "metadata.csv", {"train": {"mel": "part_2/ISIC_2.jpg", "nv": "part_1/ISIC_1.jpg part_2/ISIC_3.jpg"}},
         options={"label_column": "dx"}, decided="labels: column 'dx', as requested"),
    Case("several-columns-left", photos("part_1/ISIC_1.jpg") | {"metadata.csv": "lesion_id,image_id,dx,age\nH1,ISIC_1,nv,80\n"},
         "metadata.csv", error="columns lesion_id, dx, age could be the label; choose one with --label-column"),
    Case("gtsrb", photos("00000.ppm", "00001.ppm")
         | {"GT.csv": "Filename;Width;Height;Roi.X1;ClassId\n00000.ppm;53;54;6;16\n00001.ppm;42;45;5;1\n"}, "GT.csv",
         {"train": {"1": "00001.ppm", "16": "00000.ppm"}}, decided="labels: column 'ClassId'"),
    Case("fairface", photos("train/1.jpg", "val/2.jpg")
         | {"t.csv": "file,age,service_test\ntrain/1.jpg,50-59,True\nval/2.jpg,30-39,False\n"}, "t.csv",
         {"train": {"30-39": "val/2.jpg", "50-59": "train/1.jpg"}}, options={"label_column": "age"}),
    Case("sports", photos("train/a/1.jpg", "valid/a/1.jpg", "test/b/1.jpg")
         | {"t.csv": "class id,filepaths,labels,data set\n0,train/a/1.jpg,a,train\n1,test/b/1.jpg,b,test\n"
                     "0,valid/a/1.jpg,a,valid\n"}, "t.csv",
         {"train": {"a": "train/a/1.jpg"}, "valid": {"a": "valid/a/1.jpg"}, "test": {"b": "test/b/1.jpg"}}),
    Case("images-elsewhere", photos("images/a.jpg", "images/b.jpg") | {"annotations/t.csv": "id,label\na,x\nb,y\n"},
         "annotations/t.csv", error=("none of the 2 images", "--image-folder")),
    Case("two-extensions", photos("a.jpg", "a.png", "b.png") | {"t.csv": "id,label\na,x\nb,y\n"}, "t.csv",
         error=("line 2", "a may be a.jpg or a.png")),
    Case("pandas-index-column", FOUR | {"t.csv": ",path,label\n0,0.png,cat\n1,1.png,dog\n2,2.png,cat\n3,3.png,dog\n"},
         "t.csv", CATS),
    Case("image-and-mask", photos("a.png", "b.png", "m/a.png", "m/b.png")
         | {"t.csv": "left,right,label\na.png,m/a.png,x\nb.png,m/b.png,y\n"}, "t.csv",
         error="columns left, right name files; choose one with --image-column"),
    Case("image-beside-a-mask", photos("a.png", "b.png", "m/a.png", "m/b.png")
         | {"t.csv": "image,mask,label\na.png,m/a.png,x\nb.png,m/b.png,y\n"}, "t.csv",
         {"train": {"x": "a.png", "y": "b.png"}}),
    Case("id-and-path-of-one-file", photos("i/a.png", "i/b.png")
         | {"t.csv": "id,path,label\na,i/a.png,x\nb,i/b.png,y\n"}, "t.csv", {"train": {"x": "i/a.png", "y": "i/b.png"}}),
    Case("labels-that-are-files-too", many(2) | {"t.csv": "path,label\n0.png,1\n1.png,0\n"}, "t.csv",
         {"train": {"0": "1.png", "1": "0.png"}}),
    Case("unknown-names-of-columns", many(2) | {"t.csv": "where,what\n0.png,cat\n1.png,dog\n"}, "t.csv",
         {"train": {"cat": 1, "dog": 1}}, decided=("'where', whose cells name files", "'what', the only other one")),
    Case("label-and-its-number", many(4) | {"t.csv": "path,label,label_name\n0.png,0,cat\n1.png,1,dog\n2.png,0,cat\n3.png,1,dog\n"},
         "t.csv", CATS, decided="labels: column 'label_name'"),
    Case("class-beside-another-category", many(3) | {"t.csv": "path,class,category\n0.png,a,x\n1.png,b,x\n2.png,b,y\n"},
         "t.csv", error="columns class, category could be the label; choose one with --label-column"),
    *(Case(f"{name}-beside-another-category", many(3) | {"t.csv": f"path,category,{name}\n0.png,x,a\n1.png,x,b\n2.png,y,b\n"},
           "t.csv", {"train": {"a": 1, "b": 2}}, decided=f"labels: column '{name}', by its name")
      for name in ("label", "Labels")),
    Case("one-image", photos("0.png") | {"t.csv": "where,label\n0.png,cat\n"}, "t.csv", {"train": {"cat": 1}}),
    Case("two-columns-of-one-name", many(2) | {"t.csv": "path,label,label\n0.png,a,x\n1.png,b,y\n"}, "t.csv",
         {"train": {"a": 1, "b": 1}}),
]  # fmt: skip

LISTS = [
    Case("one-hot", many(3) | {"t.csv": "image,MEL,NV\n0.png,1.0,0.0\n1.png,0.0,1.0\n2.png,1.0,0.0\n"}, "t.csv",
         {"train": {"MEL": "0.png 2.png", "NV": "1.png"}}, decided="one-hot in 2 columns: MEL, NV"),
    Case("several-hot", many(3) | {"t.csv": "image,MEL,NV\n0.png,1,0\n1.png,1,1\n2.png,0,1\n"}, "t.csv",
         error="columns MEL, NV could be the label"),
    Case("a-list-of-paths", photos("cat/a b.png", "cat/1.png", "dog/0.png") | {"t.txt": "cat/a b.png\ncat/1.png\ndog/0.png\n"},
         "t.txt", {"train": {"cat": ("cat/a b.png", "cat/1.png"), "dog": "dog/0.png"}},
         decided="labels: the name of each image's folder"),
    Case("a-list-of-paths-in-a-csv", photos("cat/0.png", "dog/0.png") | {"t.csv": "path\ncat/0.png\ndog/0.png\n"}, "t.csv",
         {"train": {"cat": "cat/0.png", "dog": "dog/0.png"}}),
    Case("a-list-of-paths-in-one-folder", FOUR | {"t.txt": "0.png\n1.png\n"}, "t.txt", error="has no labels"),
    Case("paths-and-numbers-apart-by-spaces", FOUR | {"t.txt": "0.png 0\n1.png  1\n2.png 0\n"}, "t.txt",
         {"train": {"0": "0.png 2.png", "1": "1.png"}}, decided="spaces between columns"),
    Case("a-json-array", FOUR | {"t.json": json.dumps([{"path": f"{i}.png", "label": "cat dog".split()[i % 2]}
                                                      for i in range(4)], indent=1)}, "t.json", CATS),
    Case("a-json-object", FOUR | {"t.json": json.dumps({"0.png": "cat", "1.png": "dog"})}, "t.json",
         {"train": {"cat": "0.png", "dog": "1.png"}}),
    Case("json-lists-by-split", FOUR | {"t.json": json.dumps({"train": [{"path": "0.png", "label": 3}],
                                                              "test": [{"path": "1.png", "label": 3}]})}, "t.json",
         {"train": {"3": "0.png"}, "test": {"3": "1.png"}}),
    Case("stylegan", FOUR | {"dataset.json": json.dumps({"labels": [["0.png", 6], ["1.png", 9]]})}, "dataset.json",
         {"train": {"6": "0.png", "9": "1.png"}}),
    Case("json-lines-called-json", FOUR | {"t.json": '{"path": "0.png"}\n{"path": "1.png"}\n'}, "t.json",
         error=("is not JSON", ".jsonl")),
    Case("json-of-something-else", {"t.json": "[1, 2]"}, "t.json", error="entry 1 is not a JSON object"),
    Case("cells-of-objects", FOUR | {"t.jsonl": "".join(json.dumps({"image": {"bytes": None, "path": f"{i}.png"},
                                                                    "label": i % 2}) + "\n" for i in range(4))}, "t.jsonl",
         {"train": {"0": "0.png 2.png", "1": "1.png 3.png"}}),
    Case("objects-written-into-a-csv", FOUR | {"t.csv": "image,label\n" + "".join(
         f"\"{{'bytes': None, 'path': '{i}.png'}}\",{'cat dog'.split()[i % 2]}\n" for i in range(4))}, "t.csv", CATS),
]  # fmt: skip

SPLITS = [
    *(Case(f"split-column-{name}", splits(name, "test", "val", "train", "train", "train"), "t.csv",
           {"train": {"cat": "2.png 4.png", "dog": "3.png"}, "val": {"dog": "1.png"}, "test": {"cat": "0.png"}})
      for name in ("Split", "subset", "set", "Usage", "partition", "whatever")),
    Case("split-with-spaces-and-case", splits("split", "test", "Test ", "TRAIN", "train ", " train"), "t.csv",
         {"train": {"cat": "2.png 4.png", "dog": "3.png"}, "test": {"cat": "0.png", "dog": "1.png"}},
         decided="splits: column 'split'"),
    Case("fer2013", splits("Usage", "Training", "Training", "PublicTest", "PrivateTest"), "t.csv",
         {"Training": {"cat": "0.png", "dog": "1.png"}, "validation": {"cat": "2.png"}, "test": {"dog": "3.png"}},
         decided="PublicTest (1) is validation, PrivateTest (1) is test"),
    Case("is-test", splits("is_test", "0", "1", "0", "0"), "t.csv",
         {"train": {"cat": "0.png 2.png", "dog": "3.png"}, "test": {"dog": "1.png"}}, decided="column 'is_test': train 3"),
    Case("is-valid-as-fastai-has-it", splits("is_valid", "False", "True", "False", "False"), "t.csv",
         {"train": {"cat": "0.png 2.png", "dog": "3.png"}, "validation": {"dog": "1.png"}}),
    Case("is-train", splits("is_train", "1", "0", "1", "1"), "t.csv",
         {"train": {"cat": "0.png 2.png", "dog": "3.png"}, "test": {"dog": "1.png"}}),
    Case("train-and-test-of-yes-and-no", splits("train,test", "yes,no", "no,yes", "yes,no"), "t.csv",
         {"train": {"cat": "0.png 2.png"}, "test": {"dog": "1.png"}}),
    Case("train-is-a-class", many(3) | {"t.csv": "image,plane,train\n0.png,1,0\n1.png,0,1\n2.png,1,0\n"}, "t.csv",
         {"train": {"plane": "0.png 2.png", "train": "1.png"}}, warned="column 'train' looks like a split"),
    Case("folds-by-letters", splits("fold", *"abab"), "t.csv", {"train": {"cat": 2, "dog": 2}},
         warned="column 'fold' looks like a split (a, b) and is not used"),
    Case("is-train-and-is-test-of-one-row", splits("is_train,is_test", "1,0", "0,1", "1,1"), "t.csv",
         error="line 4 is both train and test"),
    Case("folds-not-asked-for", splits("fold", *"01234" * 2), "t.csv", {"train": {"cat": 5, "dog": 5}},
         warned="column 'fold' looks like folds (0, 1, 2, 3, 4) and is not used; --fold K"),
    Case("a-fold", splits("fold", *"01234"), "t.csv", {"train": {"cat": "0.png 4.png", "dog": "1.png 3.png"},
                                                       "validation": {"cat": "2.png"}},
         options={"fold": 2}, decided="folds: column 'fold': 2 (1) is validation, 0 (1), 1 (1), 3 (1), 4 (1) are train"),
    Case("a-fold-of-a-named-column", splits("part", *"0101"), "t.csv",
         {"train": {"cat": "0.png 2.png"}, "validation": {"dog": "1.png 3.png"}}, options={"fold": 1, "fold_column": "part"}),
    Case("a-fold-beside-a-test-split", splits("fold,split", "0,train", "1,train", "1,test", "0,train"), "t.csv",
         {"train": {"dog": "1.png"}, "validation": {"cat": "0.png", "dog": "3.png"}, "test": {"cat": "2.png"}},
         options={"fold": 0}),
    Case("no-such-fold", splits("fold", "10", "9", "0", "2"), "t.csv", error=("--fold 7: column 'fold'", "has the folds 0, 2, 9, 10"),
         options={"fold": 7}),
    Case("no-column-of-folds", csv(*ROWS), "t.csv", error=("no column looks like folds", "--fold-column"), options={"fold": 1}),
    Case("a-fold-column-alone", splits("fold", *"0101"), "t.csv", error="needs --fold", options={"fold_column": "fold"}),
    Case("numbers-for-splits", splits("split", *"0012"), "t.csv",
         error=("column 'split' holds numbers (0, 1, 2)", "--fold-column split --fold K")),
    Case("test-among-other-words", splits("source", "web", "train", "test", "book"), "t.csv", {"train": {"cat": 2, "dog": 2}},
         warned="column 'source' looks like a split (web, train, test, book) and is not used; --split-column source"),
    Case("test-among-other-words-asked-for", splits("source", "web", "train", "test", "train"), "t.csv",
         {"train": {"dog": "1.png 3.png"}, "test": {"cat": "2.png"}, "web": {"cat": "0.png"}},
         options={"split_column": "source"}, warned="rows of web are not used"),
    Case("two-columns-of-splits", splits("a,b", "train,train", "test,train", "train,test", "train,train"), "t.csv",
         error="columns a, b hold different splits; choose one with --split-column"),
    Case("two-columns-of-one-split", splits("a,b", "train,Training", "test,Test", "train,train"), "t.csv",
         {"train": {"cat": 2}, "test": {"dog": 1}}, decided="splits: column 'a'"),
    Case("split-beside-another", splits("old,split", "train,train", "test,train", "train,test", "train,train"), "t.csv",
         {"train": {"cat": "0.png", "dog": "1.png 3.png"}, "test": {"cat": "2.png"}},
         warned="column old differs from 'split' and is not used (see --split-column)"),
    Case("some-rows-without-a-split", splits("split", "train", "", "test", "train"), "t.csv",
         {"train": {"cat": "0.png", "dog": "1.png 3.png"}, "test": {"cat": "2.png"}},
         warned="1 rows have no split in column 'split' and are used for training"),
    Case("only-the-test-is-marked", splits("split", "", "", "test", ""), "t.csv",
         {"train": {"cat": "0.png", "dog": "1.png 3.png"}, "test": {"cat": "2.png"}}, decided="3 rows have no split"),
    Case("an-image-in-two-splits", csv("0.png,cat,train", "1.png,dog,train", "0.png,cat,test", header="path,label,split"),
         "t.csv", {"train": {"cat": 1, "dog": 1}, "test": {"cat": 1}}, warned="1 rows name an image in two splits"),
]  # fmt: skip

LABELS = [
    *(Case(f"missing-{number}", csv("0.png,cat", f"1.png,{word}", "2.png,dog"), "t.csv", error=("1 of 3 images have no label", "1.png"))
      for number, word in enumerate(("nan", "NaN", "null", "NA", "N/A", "None", ""))),
    Case("an-unlabeled-test", csv("0.png,cat,train", "1.png,dog,train", "2.png,,test", header="path,label,split"), "t.csv",
         {"train": {"cat": "0.png", "dog": "1.png"}}, decided="split test is left out: none of its 1 images has a label"),
    Case("a-test-of-minus-one", csv("0.png,3,train", "1.png,7,train", "2.png,-1,test", header="path,label,split"), "t.csv",
         {"train": {"3": "0.png", "7": "1.png"}}, decided="split test is left out"),
    Case("some-of-minus-one", csv("0.png,3", "1.png,7", "2.png,-1"), "t.csv", error="1 of 3 images have no label"),
    Case("classes-minus-one-and-one", csv("0.png,-1", "1.png,1"), "t.csv", {"train": {"-1": "0.png", "1": "1.png"}}),
    Case("real-numbers", many() | {"t.csv": "path,label\n" + "".join(f"{i}.png,0.{i + 1}7\n" for i in range(12))}, "t.csv",
         error=("the labels are real numbers (0.17, 0.27", "--label-column")),
    Case("half-stars", many() | {"t.csv": "path,label\n" + "".join(f"{i}.png,{i % 3}.5\n" for i in range(12))}, "t.csv",
         {"train": {"0.5": 4, "1.5": 4, "2.5": 4}}, warned="the labels are real numbers (0.5, 1.5, 2.5)"),
    Case("a-class-for-each-image", many() | {"t.csv": "path,label\n" + "".join(f"{i}.png,n{i}\n" for i in range(12))}, "t.csv",
         {"train": {f"n{i}": f"{i}.png" for i in range(12)}}, warned="12 of 12 classes have one image"),
    Case("an-identifier-for-the-label", many() | {"t.csv": "path,key\n" + "".join(f"{i}.png,n{i}\n" for i in range(12))},
         "t.csv", error=("column 'key'", "--label-column key uses it anyway")),
    Case("labels-apart-by-a-space", csv('0.png,"cat "', "1.png,cat", "2.png,dog"), "t.csv",
         {"train": {"cat": "0.png 1.png", "dog": "2.png"}}, warned="'cat ' and 'cat'"),
    Case("words-of-truth", csv("0.png,True", "1.png,False"), "t.csv", {"train": {"False": "1.png", "True": "0.png"}}),
    Case("json-numbers", jsonl(10, 9, 10, 9), "t.jsonl", {"train": {"10": "0.png 2.png", "9": "1.png 3.png"}}),
    Case("json-truth", jsonl(True, False), "t.jsonl", {"train": {"false": "1.png", "true": "0.png"}}),
    Case("json-numbers-with-points", jsonl(1.0, 2.0), "t.jsonl", {"train": {"1": "0.png", "2": "1.png"}}),
    Case("json-numbers-too-large-for-a-double", jsonl(2.0**53 - 1, 2.0**53), "t.jsonl",
         {"train": {"9007199254740991": "0.png", "9007199254740992.0": "1.png"}}),
    Case("json-lists", jsonl(["cat"], ["dog"]), "t.jsonl", error=("line 1: the label is a list (['cat'])", "a name or a whole number")),
    Case("json-empty-lists", jsonl([], []), "t.jsonl", error="line 1: the label is a list ([])"),
    Case("json-objects", jsonl("x", {"id": 1}), "t.jsonl", error="line 2: the label is an object ({'id': 1})"),
    Case("json-huge-numbers", jsonl(2**63), "t.jsonl", error="line 1: the label is a number of over 63 bits"),
    Case("json-half-a-surrogate-pair", jsonl("\ud800"), "t.jsonl", error="line 1: the label is half of a surrogate pair"),
    Case("json-words-and-numbers", jsonl("x", 3), "t.jsonl",
         error="the labels are of several types: text on line 1, a number on line 2"),
    Case("json-null-and-nan", jsonl("a", "b") | {"u.jsonl": '{"path": "0.png", "label": "a", "split": "train"}\n'
         '{"path": "1.png", "label": NaN, "split": "test"}\n'}, "u.jsonl", {"train": {"a": "0.png"}}, decided="split test is left out"),
]  # fmt: skip

DAMAGED = [  # that pyarrow ends the process for, where it is asked about the file and not for its rows
    Case("parquet-of-damaged-statistics", {"t.parquet": (Path(__file__).parent / "damaged.parquet").read_bytes()},
         "t.parquet", error=("not a readable parquet file", "histogram size mismatch")),
]  # fmt: skip

CASES = [*PLAIN, *COMMAS, *FORMS, *KAGGLE, *LISTS, *SPLITS, *LABELS, *DAMAGED]
