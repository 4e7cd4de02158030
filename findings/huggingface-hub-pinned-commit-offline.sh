#!/usr/bin/env bash
# snapshot_download of huggingface_hub 1.33, offline (HF_HUB_OFFLINE=1), for a repository that lies whole in the cache:
# by branch it returns the folder, by the commit that the branch stands for it raises, unless the cache has a list of
# files, trees/COMMIT.json. For a commit it asks the hub for that list outside of what falls back to the cache.
#
# Seen with huggingface_hub 0.36.2, 1.33.0 and 2.2.0, and a hub of one file, served by this script:
#   cache filled by           asked by   main        commit                 commit, local_files_only=True
#   0.36.2                    0.36.2     the folder  the folder             the folder
#   0.36.2                    1.33.0     the folder  OfflineModeIsEnabled   the folder
#   1.33.0, hf_hub_download   1.33.0     the folder  OfflineModeIsEnabled   the folder
#   1.33.0                    1.33.0     the folder  the folder             the folder
#   0.36.2                    2.2.0      the folder  the folder             the folder
# So who pins a commit and goes offline passes local_files_only=True as well, which needs no list.
#
# Needs Python 3.10 or newer and 200 MB; one minute. Ends with 1 if any of this has changed.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
for v in 0.36.2 1.33.0 2.2.0; do
  python3 -m venv "env-$v"
  "env-$v/bin/python" -m pip install --quiet --disable-pip-version-check "huggingface_hub==$v"
done
cat > fill.py <<'P'
"""Serves org/name, whose main is one commit with one file, and downloads it with the function named."""
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
COMMIT, BODY = "a1" * 20, b"{}"

class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        tree = [{"type": "file", "path": "config.json", "size": len(BODY), "oid": "b2" * 20}]
        about = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
        answer = json.dumps(tree if "/tree/" in self.path else about).encode()
        body = answer if self.path.startswith("/api/") else BODY
        self.send_response(200)
        for name, value in {"Content-Length": len(body), "ETag": '"b2"', "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")
    do_HEAD = do_GET

hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=hub.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="0")
import huggingface_hub
function, cache, *file = sys.argv[1:]
getattr(huggingface_hub, function)("org/name", *file, cache_dir=cache)
P
cat > ask.py <<'P'
import sys
from huggingface_hub import __version__, snapshot_download

COMMIT, (cache, expected) = "a1" * 20, sys.argv[1:]
def asked(**how):
    try:
        folder = snapshot_download("org/name", cache_dir=cache, **how)
    except OSError as error:
        return type(error).__name__
    return "the folder" if folder.endswith(COMMIT) else folder

got = [asked(revision="main"), asked(revision=COMMIT), asked(revision=COMMIT, local_files_only=True)]
print(f"{cache}, asked by {__version__}:", *got, sep="  ")
assert got == ["the folder", expected, "the folder"], "the behaviour has changed"
P
env-0.36.2/bin/python fill.py snapshot_download by-0.36 2> log || { cat log; exit 1; }
env-1.33.0/bin/python fill.py hf_hub_download by-1.33-files config.json 2> log || { cat log; exit 1; }
env-1.33.0/bin/python fill.py snapshot_download by-1.33 2> log || { cat log; exit 1; }
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
for v in 0.36.2 2.2.0; do "env-$v/bin/python" ask.py by-0.36 "the folder"; done
for cache in by-0.36 by-1.33-files; do env-1.33.0/bin/python ask.py $cache OfflineModeIsEnabled; done
env-1.33.0/bin/python ask.py by-1.33 "the folder"
