-- Addresses that were invited and have no account yet; the account will have this id.
CREATE TABLE invited_users (
    user_id UUID PRIMARY KEY NOT NULL,
    email TEXT NOT NULL UNIQUE,
    created_at BIGINT NOT NULL
);

-- SHA-256 of each token that an account can be registered with; it goes with its use.
CREATE TABLE registration_tokens (
    digest TEXT PRIMARY KEY NOT NULL,
    user_id UUID NOT NULL REFERENCES invited_users (user_id) ON DELETE CASCADE,
    organization_id UUID NOT NULL,
    expires_at BIGINT NOT NULL,
    UNIQUE (user_id, organization_id)
);
