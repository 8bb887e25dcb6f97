"""Images a second that the data loader gives, by number of workers and kind of cache, against what the demo's training takes.

    OMP_NUM_THREADS=1 python benchmarks/loader.py --folder runs/loader --out results/loader.json

The demo's training data (one image a record), processor, batch size and collator. Caches are filled first; then each setting is
read for several epochs, of which the median counts, the start of the workers included. Other work on the machine slows the images a
second, but hardly the processor time of an image, which is measured in the loader's own process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from align_ti.cli import quiet
from align_ti.data.cache import SampleCache
from align_ti.data.checking import check_records
from align_ti.data.collator import Collator, EncodedConversations
from align_ti.data.sources import read_conversations
from align_ti.digits.files import write_benchmark
from align_ti.models.loading import load_processor
from align_ti.runs import provenance, write_json
from benchmarks.demo_settings import SHORT, SIZES

WORKERS = (0, 1, 2)
CACHES = ("none", "memory", "disk")
BATCH = SHORT["per_device_train_batch_size"]


def prepared(cache: str, folder: Path) -> tuple[EncodedConversations, float]:
    """The demo's training data with its cache filled, and the seconds that took."""
    processor = load_processor(str(folder / "data" / "student"))
    conversations = read_conversations(folder / "data" / "train.json")
    disk = SampleCache(folder / "cache", processor) if cache == "disk" else None
    data = EncodedConversations(conversations, processor, cache=cache == "memory", disk=disk)
    started = time.perf_counter()
    if cache != "none":
        check_records(data)
    return data, time.perf_counter() - started


def seconds_of_an_epoch(data: EncodedConversations, workers: int) -> tuple[float, float]:
    """The time in which all batches arrive, and the processor time of this process in it."""
    collate = Collator(data.processor.tokenizer.pad_token_id)
    started, busy = time.perf_counter(), time.process_time()
    seen = sum(len(batch["input_ids"]) for batch in DataLoader(data, BATCH, num_workers=workers, collate_fn=collate))
    assert seen == len(data)
    return time.perf_counter() - started, time.process_time() - busy


def taken_by_training(results: Path) -> dict[str, float]:
    """Records a second that each method of the kept demo takes."""
    seconds = json.loads(results.read_text(encoding="utf-8"))["seconds_per_step"]
    return {name: round(BATCH / value, 1) for name, value in seconds.items() if value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--demo", type=Path, default=Path("results/demo/seed-0.json"))
    chosen = parser.parse_args()
    quiet()
    load = os.getloadavg()
    if not (chosen.folder / "data").is_dir():
        write_benchmark(chosen.folder / "data", sizes=SIZES)
    table: dict[str, dict[str, float]] = {}
    filling: dict[str, float] = {}
    processor: dict[str, float] = {}
    records = 0
    for cache in CACHES:
        data, seconds = prepared(cache, chosen.folder)
        records = len(data)
        if cache != "none":
            filling[cache] = round(records / seconds, 1)
        table[cache] = {}
        for workers in WORKERS:
            epochs = [seconds_of_an_epoch(data, workers) for _ in range(chosen.epochs)]
            table[cache][str(workers)] = round(records / statistics.median(seconds for seconds, _ in epochs), 1)
            if workers == 0:
                processor[cache] = round(1000 * statistics.median(busy for _, busy in epochs) / records, 2)
            print(cache, workers, table[cache][str(workers)], flush=True)
    content = {
        "images_per_second": table,
        "images_per_second_while_filling": filling,
        "processor_milliseconds_per_image": processor,
        "records_per_second_taken_by_training": taken_by_training(chosen.demo),
        "records": records,
        "batch": BATCH,
        "epochs": chosen.epochs,
        "threads": torch.get_num_threads(),
        "load_average_at_start": [round(value, 2) for value in load],
    }
    write_json(chosen.out, {**content, "provenance": provenance()})


if __name__ == "__main__":
    main()
