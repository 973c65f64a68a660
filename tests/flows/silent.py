"""A flow for workers in tests: it notes its process, and sleeps until it is killed."""

from __future__ import annotations

import os
import time

from prefect import flow


@flow(name="silent", persist_result=False)
def wait(notes: str) -> None:
    with open(notes, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(3600)
