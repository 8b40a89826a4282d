//! An S3 bucket: a server that implements the S3 protocol and checks signatures.

use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tempfile::TempDir;

const ACCESS: &str = "the-access-key";
const SECRET: &str = "the-secret-key";

/// A server with one bucket, in a temporary folder on a free port. Dropping the value stops it.
#[derive(Debug)]
pub struct Bucket {
    _folder: TempDir,
    endpoint: String,
    _runtime: tokio::runtime::Runtime,
}

impl Bucket {
    /// Starts the server.
    #[must_use]
    pub fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("s3-").tempdir().expect("a temporary folder");
        std::fs::create_dir(folder.path().join("bucket")).expect("a bucket");
        let files = s3s_fs::FileSystem::new(folder.path()).expect("a folder");
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(ACCESS, SECRET));
        let service = service.build();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let stream = hyper_util::rt::TokioIo::new(stream);
                    hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await
                });
            }
        });
        Self { _folder: folder, endpoint, _runtime: runtime }
    }

    /// `s3://bucket/prefix`
    #[must_use]
    pub fn location(&self, prefix: &str) -> String {
        format!("s3://bucket/{prefix}")
    }

    /// The environment variables with its endpoint and credentials.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, &str)> {
        vec![
            ("AWS_ENDPOINT", &self.endpoint),
            ("AWS_ACCESS_KEY_ID", ACCESS),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", "us-east-1"),
        ]
    }
}
