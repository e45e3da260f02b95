"""`vitft serve` under load, beside `vitft predict` on the same files: images/s, latency, errors.

python benchmarks/serve.py RUN FOLDER [--clients 200] [--seconds 60] [--files 1]

Clients send one file after the other, each in a request of its own or with others. They take CPU time of the same
machine, which is measured and reported: on a machine of its own the server would have it.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import cycle
from pathlib import Path
from urllib.parse import urlsplit

PREDICT = """
import sys, time
from pathlib import Path
from vitft import Predictor
predictor, files = Predictor(sys.argv[1]), sorted(map(str, Path(sys.argv[2]).iterdir()))
predictor(files[:64])
started, cpu, done = time.perf_counter(), time.process_time(), 0
for prediction in predictor.stream(file for _ in iter(int, 1) for file in files):
    done += 1
    if time.perf_counter() - started > float(sys.argv[3]):
        break
print(done / (time.perf_counter() - started), 1000 * (time.process_time() - cpu) / done)
"""


ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # as the command line sets it


def main() -> None:
    """Measure `predict` before and after the server, and print all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--files", type=int, default=1, help="files per request")
    parser.add_argument("--predict-seconds", type=float, default=20)
    given = parser.parse_args()
    before = predicted(given.run, given.folder, given.predict_seconds)
    served = asyncio.run(load(given.run, given.folder, given.clients, given.seconds, given.files))
    after = predicted(given.run, given.folder, given.predict_seconds)
    for name, *values in zip(("predict_images_per_s", "predict_cpu_ms_per_image"), before, after, strict=True):
        served[name] = [round(value, 2) for value in values]
    print(json.dumps(served, indent=2))


def predicted(run: str, folder: Path, seconds: float) -> list[float]:
    """Images/s of a loaded `Predictor`, again and again over the files, and milliseconds of CPU time for each."""
    words = [sys.executable, "-c", PREDICT, run, str(folder), str(seconds)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return [float(word) for word in done.stdout.split()]


async def load(run: str, folder: Path, clients: int, seconds: float, files: int) -> dict[str, object]:
    """What the server did for so many clients at once."""
    words = [sys.executable, "-m", "vitft", "serve", run, "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            place = urlsplit(server.stdout.readline().strip()).netloc
            bodies = cycle(requests(folder, files, place))
            latencies: list[float] = []
            statuses: Counter[str] = Counter()
            await metrics(place)  # opens what is opened once
            before = await metrics(place)
            cpu, started = time.process_time(), time.perf_counter()
            busy = [client(place, bodies, started + seconds, latencies, statuses) for _ in range(clients)]
            await asyncio.gather(*busy)
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
            after = await metrics(place)
        finally:
            server.send_signal(signal.SIGTERM)
        code = server.wait()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    latencies.sort()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    images = grown["vitft_images_total"]
    return {
        "cpu_ms_per_image": round(1000 * grown["process_cpu_seconds_total"] / images, 2),
        "images_per_batch": round(grown["vitft_batch_images_sum"] / grown["vitft_batch_images_count"], 1),
        "served_images_per_s": round(len(latencies) * files / wall, 1), "answers": dict(statuses), "exit_code": code,
        "latency_ms": {p: round(1000 * latencies[int(len(latencies) * p / 100)], 1) for p in (50, 95, 99)},
        "clients": clients, "seconds": round(wall, 1), "cpu_s_of_clients": round(cpu, 1),
        "largest_process_mb": round(spent.ru_maxrss / 1024),
    }  # fmt: skip


async def metrics(place: str) -> dict[str, float]:
    """What the server says of itself."""
    reader, writer = await asyncio.open_connection(*place.split(":"))
    writer.write(f"GET /metrics HTTP/1.0\r\nhost: {place}\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(("vitft_", "process_")))
    return {name: float(value) for name, value in lines}


def requests(folder: Path, files: int, place: str) -> list[bytes]:
    """A request for each file, or for some together."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    found = []
    for first in range(0, len(paths) - files + 1, files):
        body = b"".join(
            b'--x\r\ncontent-disposition: form-data; name="f"; filename="' + path.name.encode() + b'"\r\n\r\n'
            + path.read_bytes() + b"\r\n"
            for path in paths[first : first + files]
        ) + b"--x--\r\n"  # fmt: skip
        head = f"POST /predict HTTP/1.1\r\nhost: {place}\r\ncontent-type: multipart/form-data; boundary=x\r\n"
        found.append(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return found


async def client(place: str, bodies: "cycle[bytes]", until: float, latencies: list[float], seen: Counter[str]) -> None:
    """One connection that is kept, with one request at a time."""
    host, port = place.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    while (sent := time.perf_counter()) < until:
        writer.write(next(bodies))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        answer = await reader.readexactly(length)
        status = head.split(b" ", 2)[1].decode()
        seen[status if b'"error"' not in answer else f"{status}, error"] += 1
        if status == "200":
            latencies.append(time.perf_counter() - sent)
        if b"connection: close" in head.lower():
            writer.close()
            reader, writer = await asyncio.open_connection(host, int(port))
    writer.close()


if __name__ == "__main__":
    main()
