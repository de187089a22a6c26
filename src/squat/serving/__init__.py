"""An HTTP server with the interface of OpenAI's API: `squat serve`.

`server` opens the port, `app` answers requests, `requests` says what they may ask for, `answers` what comes
back, `embeddings` both of vectors, `page` what a browser sees, `line` who is next, `metrics` what has been
done so far. Needs `pip install 'squat[serve]'`.

There is one engine, and it computes one answer at a time, a token in a thread, so that the event loop stays
free, and a client that is gone or whose time is up is noticed after a token. Answers do not depend on what
was computed before: clients get the text that a single engine gives them alone.
"""
