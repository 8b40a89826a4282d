//! Access tokens: JWTs signed with an Ed25519 key that is created at the first start.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use capsule_bus::Call;
use capsule_contracts::identity::{GetKeys, KeySet};
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{FromRow, Store, Transaction, unscoped};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::EncodePrivateKey;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::IdentityService;

/// How long an access token is valid.
pub const ACCESS_SECONDS: i64 = 15 * 60;

const ISSUER: &str = "capsule";

/// The claims of an access token.
#[derive(Debug, Serialize, Deserialize)]
pub struct Claims {
    pub iss: String,
    /// The user.
    pub sub: Uuid,
    /// The session.
    pub sid: Uuid,
    /// Whether the user is an administrator of the installation.
    pub adm: bool,
    pub iat: i64,
    pub exp: i64,
}

/// Signs and verifies access tokens.
pub struct Signer {
    key_id: String,
    encoding: EncodingKey,
    decoding: DecodingKey,
    public: Vec<u8>,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Signer({})", self.key_id)
    }
}

#[derive(FromRow)]
struct KeyRow {
    id: String,
    sealed_seed: Vec<u8>,
}

impl Signer {
    /// Reads the newest signing key from the database, or creates the first.
    pub async fn open(store: &Store) -> Result<Self, Problem> {
        // Several processes may start at once; the transaction lets one create the key.
        let tx = store.begin().await?;
        let newest =
            unscoped!("keys belong to the platform", "SELECT id, sealed_seed FROM signing_keys ORDER BY created_at DESC LIMIT 1");
        let seed: [u8; 32] = match tx.read().first::<KeyRow>(newest).await? {
            Some(row) => {
                let seed = store.keyring().open_sealed(&format!("signing_keys/{}", row.id), &row.sealed_seed)?;
                seed.try_into().map_err(|_| Problem::internal())?
            }
            None => Self::create(&tx).await?,
        };
        tx.commit().await?;
        let key = SigningKey::from_bytes(&seed);
        let public = key.verifying_key().to_bytes().to_vec();
        let pkcs8 = key.to_pkcs8_der().map_err(|_| Problem::internal())?;
        Ok(Self {
            key_id: key_id(&public),
            encoding: EncodingKey::from_ed_der(pkcs8.as_bytes()),
            decoding: DecodingKey::from_ed_der(&public),
            public,
        })
    }

    async fn create(tx: &Transaction<'_>) -> Result<[u8; 32], Problem> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|_| Problem::internal())?;
        let public = SigningKey::from_bytes(&seed).verifying_key().to_bytes().to_vec();
        let id = key_id(&public);
        let sealed = tx.keyring().seal(&format!("signing_keys/{id}"), &seed)?;
        tx.run(unscoped!(
            "keys belong to the platform",
            "INSERT INTO signing_keys (id, sealed_seed, public_key, created_at) VALUES (:id, :sealed, :public, :created_at)",
            id,
            sealed,
            public,
            created_at = Timestamp::now().0
        ))
        .await?;
        Ok(seed)
    }

    /// An access token for a session of a user.
    pub fn sign(&self, user: Uuid, session: Uuid, platform_admin: bool) -> Result<String, Problem> {
        let now = Timestamp::now().as_seconds();
        let claims =
            Claims { iss: ISSUER.into(), sub: user, sid: session, adm: platform_admin, iat: now, exp: now + ACCESS_SECONDS };
        let header = Header { kid: Some(self.key_id.clone()), ..Header::new(Algorithm::EdDSA) };
        jsonwebtoken::encode(&header, &claims, &self.encoding).map_err(|cause| {
            tracing::error!(%cause, "cannot sign an access token");
            Problem::internal()
        })
    }

    /// The claims of a token, if its signature is valid and it is not expired.
    pub fn verify(&self, token: &str) -> Option<Claims> {
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_issuer(&[ISSUER]);
        validation.leeway = 0;
        jsonwebtoken::decode::<Claims>(token, &self.decoding, &validation).ok().map(|data| data.claims)
    }
}

fn key_id(public: &[u8]) -> String {
    hex::encode(&Sha256::digest(public)[..8])
}

/// Returns the public key that access tokens verify against, as a JSON Web Key Set.
pub async fn get_keys(identity: Arc<IdentityService>, _: Call<GetKeys>) -> Result<KeySet, Problem> {
    let signer = &identity.signer;
    Ok(KeySet {
        keys: vec![serde_json::json!({
            "kty": "OKP",
            "crv": "Ed25519",
            "use": "sig",
            "alg": "EdDSA",
            "kid": signer.key_id,
            "x": URL_SAFE_NO_PAD.encode(&signer.public),
        })],
    })
}

/// A new secret of 256 bits, in URL-safe text.
pub fn secret() -> Result<String, Problem> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|_| Problem::internal())?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// The digest under which a secret is stored.
pub fn digest(secret: &str) -> String {
    hex::encode(Sha256::digest(secret.as_bytes()))
}

/// Compares two secrets in constant time.
pub fn constant_time_eq(one: &str, other: &str) -> bool {
    digest(one).bytes().zip(digest(other).bytes()).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}
