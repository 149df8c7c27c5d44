"""placeholder"""


def parse_strict(message_type, data):
    return message_type.parse(data)
