CREATE TABLE users (
    id UUID PRIMARY KEY NOT NULL,
    email TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    platform_admin BOOLEAN NOT NULL,
    created_at BIGINT NOT NULL
);

-- argon2id, as a PHC string. Absent for users who sign in some other way.
CREATE TABLE credentials (
    user_id UUID PRIMARY KEY NOT NULL REFERENCES users (id),
    password_hash TEXT NOT NULL
);

CREATE TABLE sessions (
    id UUID PRIMARY KEY NOT NULL,
    user_id UUID NOT NULL REFERENCES users (id),
    created_at BIGINT NOT NULL,
    last_used_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    revoked_at BIGINT
);
CREATE INDEX sessions_of_user ON sessions (user_id);

-- SHA-256 of each token given out; a used one stays, so that its reuse is seen.
CREATE TABLE refresh_tokens (
    digest TEXT PRIMARY KEY NOT NULL,
    session_id UUID NOT NULL REFERENCES sessions (id),
    expires_at BIGINT NOT NULL,
    used_at BIGINT
);
CREATE INDEX refresh_tokens_of_session ON refresh_tokens (session_id);

-- Ed25519 keys that access tokens are signed with; the seed is sealed.
CREATE TABLE signing_keys (
    id TEXT PRIMARY KEY NOT NULL,
    sealed_seed BYTEA NOT NULL,
    public_key BYTEA NOT NULL,
    created_at BIGINT NOT NULL
);
