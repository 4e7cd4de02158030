#!/usr/bin/env bash
# `mkdocs build --quiet --strict` ends with 0 on a site with a broken link and a page in the nav that is not there.
# --strict counts warnings by a handler of the logger, and --quiet sets that logger to errors alone, so none is counted.
#
# Seen with mkdocs 1.6.1:
#   mkdocs build --strict           2 warnings, "Aborted with 2 warnings in strict mode!", ends with 1
#   mkdocs build --quiet --strict   says nothing, writes the site, ends with 0
# A job that builds quietly so as to see warnings alone checks nothing: leave --quiet out.
#
# Needs Python 3.9 or newer. Ends with 1 if this changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check mkdocs==1.6.1
mkdir docs
echo 'See [the other page](other.md).' > docs/index.md
printf 'site_name: a\nnav: [index.md, missing.md]\n' > mkdocs.yml
loud=0; env/bin/mkdocs build --strict > loud.txt 2>&1 || loud=$?
quiet=0; env/bin/mkdocs build --quiet --strict > quiet.txt 2>&1 || quiet=$?
grep -c WARNING loud.txt
echo "--strict ends with $loud, --quiet --strict with $quiet"
[ "$loud" = 1 ] && [ "$quiet" = 0 ]
