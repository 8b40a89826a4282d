//! Envelope encryption of values at rest: AES-256-GCM with one data key per value, wrapped by the
//! installation's master key.
//!
//! Layout: `1 | key id (8) | nonce (12) | wrapped data key (48) | nonce (12) | ciphertext and tag`, sizes in bytes.
//! The context (table, column and row) is authenticated, so a value copied to another row cannot be decrypted.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use capsule_contracts::Problem;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

const FORMAT_VERSION: u8 = 1;
const KEY_ID_BYTES: usize = 8;
const NONCE_BYTES: usize = 12;
const WRAPPED_KEY_BYTES: usize = 48;
const HEADER_BYTES: usize = 1 + KEY_ID_BYTES + NONCE_BYTES + WRAPPED_KEY_BYTES + NONCE_BYTES;

/// Encrypts and decrypts values with the installation's master key.
#[derive(Clone)]
pub struct Keyring {
    master: [u8; 32],
    id: [u8; KEY_ID_BYTES],
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keyring({})", hex::encode(self.id))
    }
}

impl Keyring {
    /// Reads the master key from `file`, or creates the file with a new key, readable only by its owner.
    ///
    /// # Errors
    /// When the file cannot be read or created, or does not contain a key.
    pub fn open(file: &Path) -> std::io::Result<Self> {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                create_secret_file(file, &hex::encode(random::<32>()?))?;
                std::fs::read_to_string(file)?
            }
            Err(error) => return Err(error),
        };
        let master: [u8; 32] = hex::decode(text.trim()).ok().and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| {
            std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                format!("{} does not contain a 256-bit key in hexadecimal", file.display()),
            )
        })?;
        let digest = Sha256::digest(master);
        let mut id = [0; KEY_ID_BYTES];
        id.copy_from_slice(&digest[..KEY_ID_BYTES]);
        Ok(Self { master, id })
    }

    /// Encrypts `plaintext` for `context`.
    ///
    /// # Errors
    /// When the system cannot provide random bytes.
    pub fn seal(&self, context: &str, plaintext: &[u8]) -> Result<Vec<u8>, Problem> {
        let no_random = |cause: std::io::Error| {
            tracing::error!(%cause, "cannot obtain random bytes");
            Problem::internal()
        };
        let data_key = random::<32>().map_err(no_random)?;
        let outer = random::<NONCE_BYTES>().map_err(no_random)?;
        let inner = random::<NONCE_BYTES>().map_err(no_random)?;
        let wrapped = encrypt(&self.master, outer, context, &data_key)?;
        let body = encrypt(&data_key, inner, context, plaintext)?;
        let mut sealed = Vec::with_capacity(HEADER_BYTES + body.len());
        sealed.push(FORMAT_VERSION);
        sealed.extend_from_slice(&self.id);
        sealed.extend_from_slice(&outer);
        sealed.extend_from_slice(&wrapped);
        sealed.extend_from_slice(&inner);
        sealed.extend_from_slice(&body);
        Ok(sealed)
    }

    /// Decrypts a value that [`Keyring::seal`] encrypted for the same context.
    ///
    /// # Errors
    /// When it was encrypted with another key, for another context, or was changed.
    pub fn open_sealed(&self, context: &str, sealed: &[u8]) -> Result<Vec<u8>, Problem> {
        let unreadable = || {
            tracing::error!(context, "cannot decrypt a value: it was encrypted with another master key, or is damaged");
            Problem::internal()
        };
        if sealed.len() < HEADER_BYTES || sealed[0] != FORMAT_VERSION || sealed[1..=KEY_ID_BYTES] != self.id {
            return Err(unreadable());
        }
        let (outer, rest) = sealed[1 + KEY_ID_BYTES..].split_at(NONCE_BYTES);
        let (wrapped, rest) = rest.split_at(WRAPPED_KEY_BYTES);
        let (inner, body) = rest.split_at(NONCE_BYTES);
        let data_key = decrypt(&self.master, outer, context, wrapped).ok_or_else(unreadable)?;
        let data_key: [u8; 32] = data_key.try_into().map_err(|_| unreadable())?;
        decrypt(&data_key, inner, context, body).ok_or_else(unreadable)
    }
}

/// A key for one purpose, derived from the master key. It protects what processes of one installation send each
/// other through untrusted systems, such as a broker.
#[derive(Clone)]
pub struct DerivedKey([u8; 32]);

impl std::fmt::Debug for DerivedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DerivedKey")
    }
}

/// Each message is encrypted with its own key, derived from this many random bytes, so that no nonce is used twice
/// with one key, whatever the number of messages.
const SALT_BYTES: usize = 16;

impl Keyring {
    /// Derives the key for a purpose, such as `bus`.
    #[must_use]
    pub fn derive(&self, purpose: &str) -> DerivedKey {
        DerivedKey(mac(&self.master, &[b"capsule/", purpose.as_bytes()]))
    }
}

impl DerivedKey {
    /// Encrypts and authenticates `plaintext`, and authenticates `context`. Layout: `salt (16) | nonce (12) | ciphertext
    /// and tag`, sizes in bytes.
    ///
    /// # Errors
    /// When the system cannot provide random bytes.
    pub fn seal(&self, context: &str, plaintext: &[u8]) -> Result<Vec<u8>, Problem> {
        let random = random::<{ SALT_BYTES + NONCE_BYTES }>().map_err(|cause| {
            tracing::error!(%cause, "cannot obtain random bytes");
            Problem::internal()
        })?;
        let (salt, nonce) = random.split_at(SALT_BYTES);
        let nonce: [u8; NONCE_BYTES] = nonce.try_into().map_err(|_| Problem::internal())?;
        let body = encrypt(&mac(&self.0, &[salt]), nonce, context, plaintext)?;
        Ok([random.as_slice(), &body].concat())
    }

    /// Decrypts what [`DerivedKey::seal`] encrypted for the same context. `None` for anything else.
    #[must_use]
    pub fn open(&self, context: &str, sealed: &[u8]) -> Option<Vec<u8>> {
        let (salt, rest) = sealed.split_at_checked(SALT_BYTES)?;
        let (nonce, body) = rest.split_at_checked(NONCE_BYTES)?;
        decrypt(&mac(&self.0, &[salt]), nonce, context, body)
    }

    /// Signs a message, without encrypting it (HMAC-SHA256, in hexadecimal).
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> String {
        hex::encode(mac(&self.0, &[message]))
    }

    /// Whether `signature` is the one that [`DerivedKey::sign`] returns for the message.
    #[must_use]
    pub fn verifies(&self, message: &[u8], signature: &str) -> bool {
        let mut expected = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        expected.update(message);
        hex::decode(signature).is_ok_and(|signature| expected.verify_slice(&signature).is_ok())
    }
}

fn mac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

/// Creates a file that only its owner can read, unless it exists. The file appears with its whole content.
///
/// # Errors
/// When it does not exist and cannot be created.
pub fn create_secret_file(file: &Path, content: &str) -> std::io::Result<()> {
    let temporary = file.with_extension(format!("{}.new", std::process::id()));
    let mut new = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    new.write_all(content.as_bytes())?;
    new.sync_all()?;
    let linked = std::fs::hard_link(&temporary, file);
    std::fs::remove_file(&temporary)?;
    match linked {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    }
}

fn encrypt(key: &[u8; 32], nonce: [u8; NONCE_BYTES], context: &str, message: &[u8]) -> Result<Vec<u8>, Problem> {
    Aes256Gcm::new(key.into())
        .encrypt(&Nonce::from(nonce), Payload { msg: message, aad: context.as_bytes() })
        .map_err(|_| Problem::too_large("The value is too large to encrypt."))
}

fn decrypt(key: &[u8; 32], nonce: &[u8], context: &str, message: &[u8]) -> Option<Vec<u8>> {
    let nonce: [u8; NONCE_BYTES] = nonce.try_into().ok()?;
    Aes256Gcm::new(key.into()).decrypt(&Nonce::from(nonce), Payload { msg: message, aad: context.as_bytes() }).ok()
}

fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::Keyring;

    #[test]
    fn a_sealed_value_opens_only_unchanged_and_in_its_context() {
        let directory = tempfile::tempdir().expect("tempdir");
        let keyring = Keyring::open(&directory.path().join("key")).expect("makes a key");
        let sealed = keyring.seal("secrets/1", b"hunter2").expect("seals");
        assert!(!sealed.windows(7).any(|window| window == b"hunter2"));
        assert_eq!(keyring.open_sealed("secrets/1", &sealed).expect("opens"), b"hunter2");
        keyring.open_sealed("secrets/2", &sealed).expect_err("another context");
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            keyring.open_sealed("secrets/1", &changed).expect_err("tampered with");
        }
        let other = Keyring::open(&directory.path().join("other")).expect("makes a key");
        other.open_sealed("secrets/1", &sealed).expect_err("another key");
    }

    #[test]
    fn a_derived_key_opens_and_verifies_only_messages_of_its_purpose() {
        let directory = tempfile::tempdir().expect("tempdir");
        let keyring = Keyring::open(&directory.path().join("key")).expect("makes a key");
        let (bus, other) = (keyring.derive("bus"), keyring.derive("other"));
        let sealed = bus.seal("request", b"hello").expect("seals");
        assert_eq!(bus.open("request", &sealed).as_deref(), Some(&b"hello"[..]));
        assert_eq!(bus.open("reply", &sealed), None);
        assert_eq!(other.open("request", &sealed), None);
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(bus.open("request", &changed), None);
            assert_eq!(bus.open("request", &sealed[..at]), None);
        }
        let signature = bus.sign(b"fact");
        assert!(bus.verifies(b"fact", &signature));
        assert!(!bus.verifies(b"lie", &signature) && !other.verifies(b"fact", &signature) && !bus.verifies(b"fact", "00"));
    }

    #[test]
    fn a_key_file_is_readable_only_by_its_owner_and_is_reused() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().expect("tempdir");
        let file = directory.path().join("key");
        let sealed = Keyring::open(&file).expect("makes").seal("a", b"b").expect("seals");
        assert_eq!(std::fs::metadata(&file).expect("is there").permissions().mode() & 0o777, 0o600);
        assert_eq!(Keyring::open(&file).expect("reads").open_sealed("a", &sealed).expect("opens"), b"b");
    }
}
