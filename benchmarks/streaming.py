"""Training on shards in an object store beside training on the same shards in a folder, in turns.

python benchmarks/streaming.py PACKED --model MODEL [--rounds 3] [flags of vitft train]

PACKED is what `vitft data pack` has written. The store is moto's, in a process of its own on this machine, so that it
takes a part of the CPUs. Each run has an empty cache, and one epoch. Needs `vitft[s3]` and `moto[s3,server]`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_DEFAULT_REGION": "us-east-1"}
PORT = 5599


def main() -> None:
    """Print the images/s of each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--model", default="vit-micro")
    parser.add_argument("--rounds", type=int, default=3)
    given, flags = parser.parse_known_args()
    url = f"http://127.0.0.1:{PORT}"
    env = os.environ | KEYS | {"AWS_ENDPOINT_URL": url}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(PORT)], stderr=subprocess.DEVNULL)
    try:
        fill(given.packed, url, env)
        for number in range(given.rounds):
            for name, dataset in (("folder", str(given.packed)), ("store", "s3://bucket/set")):
                wall, speed = trained(dataset, given.model, flags, env)
                said = f"{speed['images_per_s']:.0f} images/s, {100 * speed['data_wait']:.1f} % of the time waiting"
                print(f"round {number}, {name}: {said}, {wall:.1f} s in all", flush=True)
    finally:
        server.kill()


def fill(packed: Path, url: str, env: dict[str, str]) -> None:
    """Copy the shards into a bucket."""
    import boto3

    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=1)
            break
        except OSError:
            time.sleep(0.1)
    session = boto3.Session(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")
    client = session.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="bucket")
    for file in packed.glob("*.parquet"):
        client.upload_file(str(file), "bucket", f"set/{file.name}")


def trained(dataset: str, model: str, flags: list[str], env: dict[str, str]) -> tuple[float, dict[str, float]]:
    """Seconds of a run of an epoch, and its speed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vitft", "train", "--dataset", dataset, "--model", model, "--epochs", "1"]
        command += ["--output", f"{folder}/run", "--json", "--report", "off", "--skip-test", *flags]
        start = time.perf_counter()
        done = subprocess.run(command, env=env | {"VITFT_CACHE": f"{folder}/cache"}, capture_output=True, check=True)
        return time.perf_counter() - start, json.loads(done.stdout)["speed"]


if __name__ == "__main__":
    main()
