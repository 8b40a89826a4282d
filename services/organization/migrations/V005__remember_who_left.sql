-- Users whose accounts are being erased, or are: they have left for good, and nothing is made for them any more.
CREATE TABLE left_users (
    user_id UUID PRIMARY KEY NOT NULL,
    left_at BIGINT NOT NULL
);
CREATE INDEX invitations_made_by ON invitations (organization_id, invited_by);
