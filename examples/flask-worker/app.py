"""The web process: answers requests."""

import os

from flask import Flask, jsonify

app = Flask(__name__)


@app.get("/")
def hello():
    return f"<h1>Hello from Flask</h1><p>Instance {os.environ.get('CAPSULE_INSTANCE', 'local')}</p>"


@app.get("/health")
def health():
    return jsonify(status="ok")
