//! Password hashing with argon2id. Few hashes run concurrently, as each takes 19 MiB and a core for a moment.

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use capsule_contracts::Problem;
use tokio::sync::Semaphore;

/// Verified against for unknown users, so that they take as long as known ones.
const DUMMY_HASH: &str = "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Hashes and verifies passwords.
#[derive(Debug)]
pub struct Hasher {
    permits: Semaphore,
}

impl Default for Hasher {
    fn default() -> Self {
        Self { permits: Semaphore::new(2) }
    }
}

impl Hasher {
    /// The password's hash as a PHC string.
    pub async fn hash(&self, password: String) -> Result<String, Problem> {
        self.blocking(move || Argon2::default().hash_password(password.as_bytes()).map(|hash| hash.to_string()).ok())
            .await?
            .ok_or_else(Problem::internal)
    }

    /// Whether the password matches the hash. Without a hash: false, after the same time.
    pub async fn verify(&self, password: String, hash: Option<String>) -> Result<bool, Problem> {
        self.blocking(move || {
            let exists = hash.is_some();
            let text = hash.unwrap_or_else(|| DUMMY_HASH.into());
            let matches =
                PasswordHash::new(&text).is_ok_and(|hash| Argon2::default().verify_password(password.as_bytes(), &hash).is_ok());
            exists && matches
        })
        .await
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
        let _permit = self.permits.acquire().await.map_err(|_| Problem::internal())?;
        tokio::task::spawn_blocking(work).await.map_err(|_| Problem::internal())
    }
}

#[cfg(test)]
mod tests {
    use super::Hasher;

    #[tokio::test]
    async fn a_password_verifies_only_against_its_own_hash() {
        let hasher = Hasher::default();
        let hash = hasher.hash("correct horse battery".into()).await.expect("hashes");
        assert!(hash.starts_with("$argon2id$"), "{hash}");
        assert!(hasher.verify("correct horse battery".into(), Some(hash.clone())).await.expect("verifies"));
        assert!(!hasher.verify("correct horse batterz".into(), Some(hash)).await.expect("verifies"));
        assert!(!hasher.verify("anything at all".into(), None).await.expect("verifies"));
    }

    #[test]
    fn the_dummy_hash_is_well_formed_so_that_it_takes_the_same_time() {
        argon2::password_hash::phc::PasswordHash::new(super::DUMMY_HASH).expect("parses");
    }
}
