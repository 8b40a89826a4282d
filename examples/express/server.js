import express from "express";

const app = express();
const started = new Date();

app.get("/", (request, response) => {
  response.send(`<!doctype html><title>Express</title><h1>Hello from Express</h1><p>Up since ${started.toISOString()}</p>`);
});

app.get("/health", (request, response) => response.json({ status: "ok" }));

app.get("/greet/:name", (request, response) => {
  response.json({ greeting: `${process.env.GREETING ?? "Hello"}, ${request.params.name}` });
});

const server = app.listen(process.env.PORT ?? 3000, () => console.log(`listening on ${server.address().port}`));

// Finish requests in flight before the process ends.
process.on("SIGTERM", () => server.close(() => process.exit(0)));
