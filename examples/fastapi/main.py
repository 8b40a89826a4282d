"""A small API: items kept in memory."""

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

app = FastAPI(title="Items")
items: dict[int, "Item"] = {}


class Item(BaseModel):
    name: str
    price: float


@app.get("/")
def hello() -> dict[str, str]:
    return {"message": "Hello from FastAPI"}


@app.post("/items", status_code=201)
def add(item: Item) -> dict[str, int]:
    items[len(items) + 1] = item
    return {"id": len(items)}


@app.get("/items/{number}")
def get(number: int) -> Item:
    if number not in items:
        raise HTTPException(404, f"there is no item {number}")
    return items[number]
