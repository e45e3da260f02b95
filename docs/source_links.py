"""A hook of mkdocs: links from the pages to files of the repository lead to copies of these files in the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\((?:\.\./)+((?:vitft|tests)/[^)#]+\.py)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add a copy of every file that a page links to."""
    pages = [Path(file.abs_src_path).read_text(encoding="utf-8") for file in files.documentation_pages()]
    for name in sorted({name for page in pages for name in LINK.findall(page)}):
        files.append(File.generated(config, f"source/{name}.txt", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Lead the links to these copies."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda found: f"]({up}source/{found[1]}.txt)", markdown)
