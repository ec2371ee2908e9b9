use std::net::SocketAddr;

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Of an answer's head; the services send some ten lines.
const MOST_HEADERS: usize = 64;
/// An answer that is larger is none of the product's to these requests.
const MOST_BYTES: usize = 1 << 20;

/// One kept-alive connection with one request at a time.
///
/// Raw, because the load test shares its processors with what it measures: a full client would take more of them than the
/// service's own HTTP.
pub struct Client {
    address: SocketAddr,
    stream: Option<TcpStream>,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Client {
    /// Connects with the first request, and again after a failure.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            stream: None,
            request: Vec::with_capacity(512),
            answer: Vec::with_capacity(4096),
        }
    }

    /// The status code of the answer to a POST; its body is read to the end.
    ///
    /// # Errors
    /// If the connection fails, or what comes is no answer with a length; nobody knows then what became of the request.
    pub async fn post(&mut self, path: &str, body: &str) -> anyhow::Result<u16> {
        self.request.clear();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        self.request.extend_from_slice(head.as_bytes());
        self.request.extend_from_slice(body.as_bytes());
        // Taken out: after a failure, or when the caller gives up, nobody knows where it stands.
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => connect(self.address).await?,
        };
        stream.write_all(&self.request).await.context("send the request")?;
        let (status, keeps) = read_answer(&mut stream, &mut self.answer).await?;
        self.stream = keeps.then_some(stream);
        Ok(status)
    }
}

async fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(address).await.context("connect to the API")?;
    stream.set_nodelay(true).context("set TCP_NODELAY")?;
    Ok(stream)
}

/// Status, and whether the connection may be used again.
async fn read_answer(stream: &mut TcpStream, answer: &mut Vec<u8>) -> anyhow::Result<(u16, bool)> {
    answer.clear();
    loop {
        let read = stream.read_buf(answer).await.context("read the answer")?;
        if read == 0 {
            bail!("the connection was closed before the answer was whole");
        }
        if answer.len() > MOST_BYTES {
            bail!("the answer is larger than {MOST_BYTES} bytes");
        }
        if let Some(head) = Head::read(answer)?
            && answer.len() >= head.bytes
        {
            return Ok((head.status, head.keeps));
        }
    }
}

/// What of an answer's head matters here.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    keeps: bool,
    /// Of head and body.
    bytes: usize,
}

impl Head {
    /// `None` while it is not whole.
    fn read(answer: &[u8]) -> anyhow::Result<Option<Self>> {
        let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(head) = response.parse(answer).context("read the answer's head")? else {
            return Ok(None);
        };
        let status = response.code.context("the answer has no status")?;
        let (mut length, mut keeps) = (None, true);
        for header in response.headers {
            if header.name.eq_ignore_ascii_case("content-length") {
                let value = std::str::from_utf8(header.value).context("content-length")?;
                length = Some(value.parse::<usize>().context("content-length")?);
            }
            if header.name.eq_ignore_ascii_case("connection") {
                keeps = !header.value.eq_ignore_ascii_case(b"close");
            }
        }
        let length = length.context("the answer has no content-length")?;
        Ok(Some(Self {
            status,
            keeps,
            bytes: head.saturating_add(length),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_once_it_is_whole() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nconnection: close\r\n\r\n{}";
        for end in 0..answer.len() - 2 {
            assert_eq!(Head::read(&answer[..end]).unwrap(), None);
        }
        let head = Head::read(answer).unwrap().unwrap();
        assert_eq!((head.status, head.keeps, head.bytes), (200, false, answer.len()));
        assert!(Head::read(b"SSH-2.0\r\n\r\n").is_err());
        assert!(Head::read(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
