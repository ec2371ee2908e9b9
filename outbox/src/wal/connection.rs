use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
    },
    message::frontend,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};

use super::address::{Address, Tls};
use crate::watermark::Lsn;

/// The whole of connecting, TLS and authentication.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A simple query of the relay reads a catalog row or makes a slot. Making one waits for the transactions that are
/// open at that moment.
const QUERY_TIMEOUT: Duration = Duration::from_secs(60);
/// One large buffer, so that a burst of small messages costs one read and not two per message.
const READ_BUFFER_BYTES: usize = 256 * 1024;
/// PostgreSQL's own limit for one message.
const MAX_MESSAGE_BYTES: usize = 1 << 30;
/// Seconds between 1970 (Unix) and 2000 (PostgreSQL).
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("connection lost")]
    Io(#[from] std::io::Error),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("TLS")]
    Tls(#[from] native_tls::Error),
    #[error("the server does not offer TLS, which sslmode demands")]
    TlsRefused,
    #[error("the server asks for authentication method {0}, known are password, md5 and SCRAM-SHA-256")]
    Authentication(i32),
    #[error("the server asks for a password, the URL has none")]
    PasswordMissing,
    /// An error response of the server, by SQLSTATE.
    #[error("{message} (SQLSTATE {code})")]
    Server { code: String, message: String },
    #[error("there is no publication {0}: the log would pass every row by")]
    PublicationMissing(String),
    /// The log has passed rows by that were committed while their publication did not exist. Since PostgreSQL 18 the server
    /// only warns of it, and streams on; before that every stream ended at the first of these rows.
    #[error("rows were left out of the stream: {0}")]
    LeftOut(String),
    #[error("unexpected message: {0}")]
    Protocol(String),
}

/// `object_not_in_prerequisite_state`, of the warning "skipped loading publication".
const SKIPPED: &str = "55000";
/// `undefined_object`, of the error that servers before 18 ended the stream with.
const UNDEFINED: &str = "42704";

impl ConnectionError {
    /// The server's SQLSTATE, if the error is its answer.
    pub(crate) fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Server { code, .. } => Some(code),
            _ => None,
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A walsender connection: simple queries until it streams.
pub(crate) struct Connection {
    stream: Box<dyn Stream>,
    read: BytesMut,
    write: BytesMut,
}

/// A message of the stream.
#[derive(Debug)]
pub(crate) enum Frame {
    /// One pgoutput message.
    Data(Bytes),
    /// The server has sent everything up to `end`; `reply` asks for a status at once.
    Keepalive { end: Lsn, reply: bool },
}

impl Connection {
    pub(crate) async fn connect(address: &Address, application: &str) -> Result<Self, ConnectionError> {
        tokio::time::timeout(CONNECT_TIMEOUT, Self::start_up(address, application))
            .await
            .map_err(|_| ConnectionError::Timeout(CONNECT_TIMEOUT))?
    }

    async fn start_up(address: &Address, application: &str) -> Result<Self, ConnectionError> {
        let tcp = TcpStream::connect((address.host.as_str(), address.port)).await?;
        tcp.set_nodelay(true)?;
        let stream = negotiate_tls(address, tcp).await?;
        let mut connection = Self {
            stream,
            read: BytesMut::with_capacity(READ_BUFFER_BYTES),
            write: BytesMut::new(),
        };
        frontend::startup_message(
            [
                ("user", address.user.as_str()),
                ("database", &address.database),
                ("replication", "database"),
                ("application_name", application),
                ("client_encoding", "UTF8"),
                ("DateStyle", "ISO"),
                ("TimeZone", "UTC"),
                // A server that lost us without a reset frees the slot after this time (HAZARDS H21).
                ("wal_sender_timeout", "10s"),
                // The same before it streams, while the connection holds the leader's lock.
                ("tcp_keepalives_idle", "5"),
                ("tcp_keepalives_interval", "2"),
                ("tcp_keepalives_count", "3"),
                ("client_connection_check_interval", "5s"),
            ],
            &mut connection.write,
        )?;
        connection.flush().await?;
        connection.authenticate(address).await?;
        Ok(connection)
    }

    async fn authenticate(&mut self, address: &Address) -> Result<(), ConnectionError> {
        let password = || {
            address
                .password
                .as_ref()
                .map(|password| &password.0)
                .ok_or(ConnectionError::PasswordMissing)
        };
        let mut scram: Option<ScramSha256> = None;
        loop {
            let (tag, mut body) = self.message().await?;
            match tag {
                b'R' => match body.try_get_i32().unwrap_or(-1) {
                    0 => {}
                    3 => frontend::password_message(password()?.as_bytes(), &mut self.write)?,
                    5 if body.len() >= 4 => {
                        let salt = [body[0], body[1], body[2], body[3]];
                        let hash = md5_hash(address.user.as_bytes(), password()?.as_bytes(), salt);
                        frontend::password_message(hash.as_bytes(), &mut self.write)?;
                    }
                    10 => {
                        let state = ScramSha256::new(password()?.as_bytes(), ChannelBinding::unsupported());
                        frontend::sasl_initial_response(SCRAM_SHA_256, state.message(), &mut self.write)?;
                        scram = Some(state);
                    }
                    11 => {
                        let state = scram.as_mut().ok_or_else(|| unexpected("SASL without a start"))?;
                        state.update(&body)?;
                        frontend::sasl_response(state.message(), &mut self.write)?;
                    }
                    // The server proves that it knows the password as well.
                    12 => scram
                        .as_mut()
                        .ok_or_else(|| unexpected("SASL without a start"))?
                        .finish(&body)?,
                    method => return Err(ConnectionError::Authentication(method)),
                },
                b'E' => return Err(server_error(&body)),
                b'Z' => return Ok(()),
                // Parameters, the cancellation key, notices.
                b'S' | b'K' | b'N' | b'v' => {}
                other => return Err(unexpected(format_args!("{:?} during start-up", char::from(other)))),
            }
            self.flush().await?;
        }
    }

    /// Runs one simple query and returns its rows as text.
    pub(crate) async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, ConnectionError> {
        tokio::time::timeout(QUERY_TIMEOUT, self.run_query(sql))
            .await
            .map_err(|_| ConnectionError::Timeout(QUERY_TIMEOUT))?
    }

    async fn run_query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, ConnectionError> {
        frontend::query(sql, &mut self.write)?;
        self.flush().await?;
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            let (tag, mut body) = self.message().await?;
            match tag {
                b'D' => rows.push(data_row(&mut body)?),
                b'E' => failure = Some(server_error(&body)),
                b'Z' => return failure.map_or(Ok(rows), Err),
                // Row description, command complete, empty query, notice, parameter.
                b'T' | b'C' | b'I' | b'N' | b'S' => {}
                other => return Err(unexpected(format_args!("{:?} in a query", char::from(other)))),
            }
        }
    }

    /// Begins to stream from the slot's confirmed position.
    pub(crate) async fn start_replication(&mut self, slot: &str, publication: &str) -> Result<(), ConnectionError> {
        let publication = publication.replace('\'', "''");
        let command = format!(
            "START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '1', publication_names '\"{publication}\"')"
        );
        frontend::query(&command, &mut self.write)?;
        self.flush().await?;
        loop {
            let (tag, body) = tokio::time::timeout(QUERY_TIMEOUT, self.message())
                .await
                .map_err(|_| ConnectionError::Timeout(QUERY_TIMEOUT))??;
            match tag {
                // CopyBothResponse.
                b'W' => return Ok(()),
                b'E' => return Err(server_error(&body)),
                b'N' | b'S' | b'T' | b'C' => {}
                other => {
                    return Err(unexpected(format_args!(
                        "{:?} instead of the stream",
                        char::from(other)
                    )));
                }
            }
        }
    }

    /// The next frame that has already been read from the socket.
    pub(crate) fn buffered_frame(&mut self) -> Result<Option<Frame>, ConnectionError> {
        while let Some((tag, mut body)) = self.buffered_message()? {
            match tag {
                b'd' => match body.try_get_u8().unwrap_or_default() {
                    // Start, end and clock come first; positions are taken from the commits inside instead.
                    b'w' if body.len() >= 24 => {
                        body.advance(24);
                        return Ok(Some(Frame::Data(body)));
                    }
                    b'k' if body.len() >= 17 => {
                        let end = Lsn(body.get_u64());
                        body.advance(8);
                        return Ok(Some(Frame::Keepalive {
                            end,
                            reply: body.get_u8() == 1,
                        }));
                    }
                    kind => return Err(unexpected(format_args!("stream message {kind}"))),
                },
                b'E' => {
                    return Err(match server_error(&body) {
                        ConnectionError::Server { code, message } if code == UNDEFINED => {
                            ConnectionError::LeftOut(message)
                        }
                        error => error,
                    });
                }
                b'N' => {
                    if let ConnectionError::Server { code, message } = server_error(&body)
                        && code == SKIPPED
                    {
                        return Err(ConnectionError::LeftOut(message));
                    }
                }
                b'S' => {}
                b'c' => return Err(unexpected("the server ended the stream")),
                other => return Err(unexpected(format_args!("{:?} in the stream", char::from(other)))),
            }
        }
        Ok(None)
    }

    /// Reads what the socket has. Safe to cancel.
    pub(crate) async fn fill(&mut self) -> Result<(), ConnectionError> {
        self.read.reserve(READ_BUFFER_BYTES / 2);
        if self.stream.read_buf(&mut self.read).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        Ok(())
    }

    /// Tells the server up to where everything is safe; it may forget its log up to there.
    pub(crate) async fn send_status(&mut self, safe: Lsn, now_micros: i64) -> Result<(), ConnectionError> {
        let mut status = Vec::with_capacity(34);
        status.push(b'r');
        for _written_flushed_applied in 0..3 {
            status.extend_from_slice(&safe.0.to_be_bytes());
        }
        status.extend_from_slice(&(now_micros - POSTGRES_EPOCH_MICROS).to_be_bytes());
        // Ask for an answer each time: a silent half-open connection is then noticed.
        status.push(1);
        frontend::CopyData::new(&status[..])?.write(&mut self.write);
        self.flush().await
    }

    /// Ends the session, so that the slot is free at once.
    pub(crate) async fn close(mut self) -> Result<(), ConnectionError> {
        frontend::copy_done(&mut self.write);
        frontend::terminate(&mut self.write);
        self.flush().await?;
        self.stream.shutdown().await?;
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), ConnectionError> {
        if !self.write.is_empty() {
            self.stream.write_all_buf(&mut self.write).await?;
            self.stream.flush().await?;
        }
        Ok(())
    }

    async fn message(&mut self) -> Result<(u8, Bytes), ConnectionError> {
        loop {
            if let Some(message) = self.buffered_message()? {
                return Ok(message);
            }
            self.fill().await?;
        }
    }

    fn buffered_message(&mut self) -> Result<Option<(u8, Bytes)>, ConnectionError> {
        let Some(&[tag, a, b, c, d]) = self.read.first_chunk::<5>() else {
            return Ok(None);
        };
        let length = usize::try_from(i32::from_be_bytes([a, b, c, d])).unwrap_or(0);
        if !(4..=MAX_MESSAGE_BYTES).contains(&length) {
            return Err(unexpected(format_args!("a message of {length} bytes")));
        }
        if self.read.len() < length + 1 {
            self.read.reserve(length + 1 - self.read.len());
            return Ok(None);
        }
        let mut message = self.read.split_to(length + 1).freeze();
        message.advance(5);
        Ok(Some((tag, message)))
    }
}

async fn negotiate_tls(address: &Address, mut tcp: TcpStream) -> Result<Box<dyn Stream>, ConnectionError> {
    if address.tls == Tls::Disable {
        return Ok(Box::new(tcp));
    }
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    tcp.write_all(&request).await?;
    if tcp.read_u8().await? != b'S' {
        return if address.tls == Tls::Prefer {
            Ok(Box::new(tcp))
        } else {
            Err(ConnectionError::TlsRefused)
        };
    }
    let mut connector = native_tls::TlsConnector::builder();
    match address.tls {
        Tls::VerifyFull | Tls::Disable => {}
        Tls::VerifyCa => {
            connector.danger_accept_invalid_hostnames(true);
        }
        Tls::Prefer | Tls::Require => {
            connector
                .danger_accept_invalid_hostnames(true)
                .danger_accept_invalid_certs(true);
        }
    }
    if let Some(path) = &address.root_certificate {
        let pem = tokio::fs::read(path).await?;
        connector.add_root_certificate(native_tls::Certificate::from_pem(&pem)?);
    }
    let connector = tokio_native_tls::TlsConnector::from(connector.build()?);
    Ok(Box::new(connector.connect(&address.host, tcp).await?))
}

fn data_row(body: &mut Bytes) -> Result<Vec<Option<String>>, ConnectionError> {
    let short = |_| unexpected("a short data row");
    let columns = body.try_get_i16().map_err(short)?;
    (0..columns)
        .map(|_| {
            let Ok(length) = usize::try_from(body.try_get_i32().map_err(short)?) else {
                return Ok(None);
            };
            if body.len() < length {
                return Err(unexpected("a short data row"));
            }
            let value = body.split_to(length);
            String::from_utf8(value.to_vec())
                .map(Some)
                .map_err(|_| unexpected("a value that is not UTF-8"))
        })
        .collect()
}

/// Error response or notice: fields of one byte and a NUL-terminated text.
fn server_error(body: &[u8]) -> ConnectionError {
    let field = |wanted: u8| {
        body.split(|byte| *byte == 0)
            .find(|field| field.first() == Some(&wanted))
            .map(|field| String::from_utf8_lossy(&field[1..]).into_owned())
            .unwrap_or_default()
    };
    ConnectionError::Server {
        code: field(b'C'),
        message: field(b'M'),
    }
}

fn unexpected(what: impl std::fmt::Display) -> ConnectionError {
    ConnectionError::Protocol(what.to_string())
}
