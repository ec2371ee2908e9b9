use std::{
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// Between the service and its database. While armed, the next COMMIT reaches the server and is carried out, and the
/// connection ends before the answer: what a network does at the worst moment.
pub(crate) struct LostCommit {
    pub(crate) url: String,
    pub(crate) armed: Arc<AtomicBool>,
}

impl LostCommit {
    pub(crate) async fn in_front_of(url: &str) -> Self {
        let options = PgConnectOptions::from_str(url).unwrap();
        let server = (options.get_host().to_owned(), options.get_port());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let armed = Arc::new(AtomicBool::new(false));
        let accepting = armed.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(server.clone()).await.unwrap();
                tokio::spawn(forward(client, server, accepting.clone()));
            }
        });
        Self {
            url: options.host("127.0.0.1").port(port).to_url_lossy().to_string(),
            armed,
        }
    }
}

/// Ends with either side; an error of a connection that was cut is the point of it.
async fn forward(mut client: TcpStream, mut server: TcpStream, armed: Arc<AtomicBool>) -> std::io::Result<()> {
    let (mut from_client, mut from_server) = (vec![0; 65_536], vec![0; 65_536]);
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                let sent = &from_client[..read?];
                if sent.is_empty() {
                    return Ok(());
                }
                server.write_all(sent).await?;
                // A simple query: `Q`, the length, the text.
                let commit = sent.windows(7).any(|window| window == b"COMMIT\0");
                if commit && armed.swap(false, Ordering::SeqCst) {
                    let answer = server.read(&mut from_server);
                    return tokio::time::timeout(Duration::from_secs(10), answer).await?.map(|_| ());
                }
            }
            read = server.read(&mut from_server) => {
                let answered = &from_server[..read?];
                if answered.is_empty() {
                    return Ok(());
                }
                client.write_all(answered).await?;
            }
        }
    }
}
