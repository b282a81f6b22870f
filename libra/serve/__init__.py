"""An OpenAI-compatible server of a model with compressed visual tokens: ``python -m libra.serve``.

The server is transformers' own (its model manager, chat handler, answer queue and web application). This
package adds what it lacks: a compression for each request, figures of it in the answer, the gate for
pictures, refusals in one sentence, limits, metrics and an end in time.
One process answers one request at a time.
"""
