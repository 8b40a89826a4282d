-- When and why each attempt to handle an event failed, as a JSON list.
ALTER TABLE inbox ADD COLUMN errors TEXT;

-- Processes over several services: what is done, one step after the other, or undone again.
CREATE TABLE sagas (
    id UUID PRIMARY KEY NOT NULL,
    name TEXT NOT NULL,
    input TEXT NOT NULL,
    correlation_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'undoing', 'done', 'undone')),
    -- The step that comes next.
    step INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    next_attempt_at BIGINT NOT NULL,
    last_error TEXT,
    history TEXT NOT NULL,
    started_at BIGINT NOT NULL,
    ended_at BIGINT
);
CREATE INDEX sagas_under_way ON sagas (next_attempt_at) WHERE ended_at IS NULL;
