"""What a served or loaded model is worth: answers, precision, throughput; result files, and the report made of them."""
