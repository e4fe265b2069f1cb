//! TLS: the only file that names rustls.

use super::timed::Timed;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned, version};
use std::io;
use std::sync::Arc;

/// The server's side of one TLS connection.
pub type Session = StreamOwned<ServerConnection, Timed>;

/// What every connection of the outward server starts from.
#[derive(Clone, Debug)]
pub struct Acceptor(Arc<ServerConfig>);

/// One of the two files.
#[derive(PartialEq, Eq, Debug)]
pub enum Part {
    Chain,
    Key,
}

impl Acceptor {
    /// Takes a PEM chain and its private key (PKCS#1, PKCS#8 or SEC1). The
    /// error is a sentence, and which of them is wrong.
    pub fn new(chain: &[u8], key: &[u8], tls12: bool) -> Result<Acceptor, (Part, String)> {
        let chain: Vec<CertificateDer<'static>> = rustls_pemfile::certs(&mut &chain[..])
            .collect::<Result<_, _>>()
            .map_err(|error| (Part::Chain, format!("the certificate file is not PEM: {error}")))?;
        if chain.is_empty() {
            return Err((Part::Chain, "the certificate file holds no CERTIFICATE block".into()));
        }
        let key: PrivateKeyDer<'static> = rustls_pemfile::private_key(&mut &key[..])
            .map_err(|error| (Part::Key, format!("the key file is not PEM: {error}")))?
            .ok_or_else(|| (Part::Key, "the key file holds no unencrypted private key".into()))?;
        let versions: &[_] = match tls12 {
            true => &[&version::TLS13, &version::TLS12],
            false => &[&version::TLS13],
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|error| (Part::Key, error.to_string()))?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|error| (Part::Key, format!("this pair cannot be used: {error}")))?;
        config.ignore_client_order = true;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Acceptor(Arc::new(config)))
    }

    /// Starts TLS on a connection; the handshake is made by the first read.
    pub fn session(&self, socket: Timed) -> io::Result<Session> {
        let connection = ServerConnection::new(self.0.clone()).map_err(io::Error::other)?;
        Ok(StreamOwned::new(connection, socket))
    }
}

/// Tells the peer that nothing more comes (RFC 8446, 6.1).
pub fn close(session: &mut Session) {
    session.conn.send_close_notify();
    let _ = session.conn.complete_io(&mut session.sock);
}
